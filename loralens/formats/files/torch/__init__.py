"""The pickles of torch, read without running any of their code."""
