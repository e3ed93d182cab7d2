"""The dialect of microsoft/loralib, the package of the LoRA paper."""
