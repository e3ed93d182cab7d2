"""The GGUF container: its header, its key-values and its tensors."""
