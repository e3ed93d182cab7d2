"""An adapter from two checkpoints: their difference, how much of it is noise, and what a rank holds of it."""
