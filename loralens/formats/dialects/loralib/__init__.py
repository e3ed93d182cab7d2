"""microsoft/loralib, the LoRA paper's own package."""
