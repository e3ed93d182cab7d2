"""Sketches of updates: short vectors whose inner products estimate those of the updates."""
