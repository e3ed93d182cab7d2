"""Making and updating an index: which files are new, what is measured of each, and who measures it."""
