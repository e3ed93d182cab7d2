"""llama.cpp's GGUF adapters."""
