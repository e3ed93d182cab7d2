"""The dialect of llama.cpp's GGUF adapters."""
