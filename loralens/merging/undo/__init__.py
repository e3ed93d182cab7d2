"""Unmerging: the patch that an undo file holds, its layout, and the base back from it bit for bit."""
