"""Merging in memory: the weights of a loaded model, and the switchboard that switches it between adapters."""
