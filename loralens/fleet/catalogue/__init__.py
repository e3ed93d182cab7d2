"""The catalogue of a fleet: what is known of every file, in SQLite, and the file of the sketches."""
