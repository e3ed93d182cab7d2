"""The dialect loralens-q, which stores modules in few bits."""
