"""Search by example: sketches propose members, and exact inner products decide."""
