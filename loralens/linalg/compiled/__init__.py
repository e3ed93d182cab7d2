"""Inner loops in C, which are compiled where the installation finds a compiler; NumPy does the same work elsewhere."""
