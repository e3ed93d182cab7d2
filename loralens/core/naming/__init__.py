"""How models and dialects call their modules, and which names mean the same weight."""
