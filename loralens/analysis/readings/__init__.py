"""What one pass over the numbers of an adapter measures for the checks and for a report."""
