"""The dialect of diffusers."""
