"""An adapter against the weights of its base."""
