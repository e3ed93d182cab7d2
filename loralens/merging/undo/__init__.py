"""Unmerging: the patch in an undo file, the layout of that file, and restoring the base bit for bit."""
