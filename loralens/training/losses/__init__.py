"""The losses of language models: the one that a model computes itself, and the same one in blocks of rows."""
