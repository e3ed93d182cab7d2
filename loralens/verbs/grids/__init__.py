"""Grids of training runs: many runs of ``train`` in one folder, made once, with a table of settings and results."""
