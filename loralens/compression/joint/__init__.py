"""Compression of several adapters together: bases that they share, and a small core for each of them."""
