"""Merging in memory: the weights of a model that is loaded, and the switchboard of several adapters on it."""
