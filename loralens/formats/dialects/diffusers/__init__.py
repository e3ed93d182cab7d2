"""diffusers and its kin."""
