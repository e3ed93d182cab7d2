"""Base models on disk: their checkpoints, and changed copies of them."""
