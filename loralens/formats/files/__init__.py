"""Files on disk: containers, and writing that leaves a whole file or none."""
