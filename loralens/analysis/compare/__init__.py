"""Comparisons between adapters: subspaces, cosines, interference and equality."""
