"""The dialects of adapter files: one module or package for each, and what several of them share."""
