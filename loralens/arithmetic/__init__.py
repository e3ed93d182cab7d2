"""Adapters as vectors: exact sums, and the combining methods of the literature in the small space that they span."""
