"""Updates, bases and weights of a base model that are stored as integers or codes of a few bits."""
