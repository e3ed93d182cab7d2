"""Verbs for one adapter as verbs for several: the run, and its result."""
