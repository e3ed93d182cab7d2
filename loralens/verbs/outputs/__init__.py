"""What verbs write: where it goes, in which dialect, and what rounding costs it."""
