"""Verbs for one adapter as verbs for several: what is done with each, in which process, and the record of it."""
