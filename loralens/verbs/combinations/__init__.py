"""Adapters made from adapters: sums, methods of the literature, other scales, fewer modules."""
