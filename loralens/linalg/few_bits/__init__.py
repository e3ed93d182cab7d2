"""Numbers in a few bits: NF4, and the blocks of ggml."""
