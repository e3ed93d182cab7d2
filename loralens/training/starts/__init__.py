"""The first factors of a run: drawn, made of the weights or of a gradient, or taken from an adapter."""
