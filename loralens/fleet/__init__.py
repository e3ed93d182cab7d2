"""Fleets: an index of thousands of adapters, with a sketch of each update, for search, copies, runs and families."""
