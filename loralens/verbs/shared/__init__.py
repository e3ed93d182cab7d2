"""What several rooms of verbs need: reading adapters and bases, and the values of options."""
