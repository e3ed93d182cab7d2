"""The inputs of the verbs: adapters, bases, models and texts are read here, with warnings if they do not match."""
