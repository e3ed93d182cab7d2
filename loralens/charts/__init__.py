"""Results drawn as matplotlib Figures, never through pyplot."""
