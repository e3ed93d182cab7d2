"""One-line mistakes made on purpose, each with the tests that must notice it: ``python -m tests.mutants``."""
