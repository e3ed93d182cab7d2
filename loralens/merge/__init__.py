"""Into the base and back: merging with proof, exact unmerging, extraction."""
