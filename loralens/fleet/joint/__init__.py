"""Joint compression: the whole fleet in one file, and its adapters back."""
