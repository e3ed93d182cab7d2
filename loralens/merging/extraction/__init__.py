"""Extracting an adapter from two checkpoints: their difference, the noise in it, and how much of it a rank keeps."""
