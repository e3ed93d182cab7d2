"""Measures of an adapter against the weights of its base."""
