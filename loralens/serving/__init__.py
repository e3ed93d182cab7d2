"""Adapters on servers: one client for each interface of a server, behind one class. The only room with a network."""
