"""The rules that tell what a server or loader would reject, or silently ignore, in an adapter."""
