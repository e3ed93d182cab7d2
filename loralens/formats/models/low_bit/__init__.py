"""Quantised base models: reading, dequantising and encoding their weights again."""
