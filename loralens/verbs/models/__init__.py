"""Models that are run, and the texts that they see."""
