"""The name of what is merged into a model in memory."""

Task = tuple[tuple[str, float], ...]  # names of adapters and their weights; empty for the base
