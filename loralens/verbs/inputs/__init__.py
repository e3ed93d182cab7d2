"""What verbs are given: adapters, bases, models and texts, read, with warnings where they do not fit together."""
