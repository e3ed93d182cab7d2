"""The dialect with the generic names of ComfyUI."""
