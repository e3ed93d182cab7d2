"""What an adapter is like: measured, never changed."""
