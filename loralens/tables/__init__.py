"""Tables: columns that are declared once, and rendered for a terminal, CSV, JSON, HTML, LaTeX or pandas."""
