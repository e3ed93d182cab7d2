"""Groups of the members of a fleet: copies, runs and families."""
