"""What an index answers by itself: rows of its catalogue, counts, and adapters that do nothing."""
