"""Apple's mlx-lm."""
