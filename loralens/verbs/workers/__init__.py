"""Processes that work for a verb, each on one task at a time."""
