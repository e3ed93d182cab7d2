"""Adapters merged into models, and out of them again."""
