"""Adapters on servers: whether they are live there, and what a server says it has."""
