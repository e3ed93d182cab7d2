"""Reports: what the verbs found about adapters, as one page, as Markdown with pictures, and as JSON."""
