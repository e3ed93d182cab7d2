"""Smaller adapters, and the statistics of inputs that make them better."""
