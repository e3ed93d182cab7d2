"""The verbs of a fleet: its index as `loralens.Fleet`, and what it answers."""
