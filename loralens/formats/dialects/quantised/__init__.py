"""loralens's own dialect for modules in few bits."""
