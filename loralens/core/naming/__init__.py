"""The names of modules in models and dialects, and which of them belong to the same weight."""
