"""The dialect of LitGPT."""
