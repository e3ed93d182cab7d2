"""ComfyUI's generic names."""
