"""Weights of a base model that are stored as codes of a few bits."""
