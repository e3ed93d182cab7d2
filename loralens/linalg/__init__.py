"""Arrays in, arrays out; no word of LoRA."""
