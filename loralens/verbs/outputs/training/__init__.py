"""What `train` does with its options and inputs: the run itself, what it shows and writes, and its result."""
