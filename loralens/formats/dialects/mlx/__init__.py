"""The dialect of Apple's mlx-lm."""
