"""Adapters beside adapters: directions, equality, and the checkpoints of one run."""
