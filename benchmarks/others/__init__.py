"""loralens beside other tools, each on the same files, in turns within one run: ``python -m benchmarks.others``."""
