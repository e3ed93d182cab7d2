"""Numbers in a few bits: integers with scales, NF4, and the blocks of ggml."""
