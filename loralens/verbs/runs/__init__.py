"""Training, evaluation and grids of runs."""
