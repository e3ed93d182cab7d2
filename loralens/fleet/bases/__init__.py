"""Base models of adapters: which one names and shapes show."""
