"""Smaller adapters, and what the smaller size cost."""
