"""Base models whose weights are stored as codes of a few bits: reading, dequantising and encoding them again."""
