"""Small adapters that the project has trained, in the odd layouts of the field; `make` makes them again."""
