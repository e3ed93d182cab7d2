"""Merges and unmerges as they run, their certificates, and what rounding and merging cost."""
