"""Figures as plain data, and their two renderers: SVG for pages, matplotlib for files and notebooks."""
