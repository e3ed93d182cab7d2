"""Merging into weights of a few bits: the scales stay, and codes move on their grid."""
