"""The nouns of the field: LowRank, Adapter, module names."""
