"""Adapters in other dialects, and where and how adapters are written."""
