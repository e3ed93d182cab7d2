"""Reading and writing the pickles of torch without torch, and without running code of a file."""
