"""The file of a compressed fleet: many adapters in one safetensors file (docs/fleet_file.md describes every byte).

=====================  =====================================================================================
adapters.I.about       JSON in UTF-8: everything about adapter I but its numbers
adapters.I.numbers     its own numbers: the core in the bases of its group, or its modules in few bits
groups.G.out           U of every module of group G, in few bits
groups.G.in            V
groups.G.widths        bits of the entries of a core
extras.DIGEST          a tensor that belongs to no pair, as it was stored; equal ones are stored once
=====================  =====================================================================================

The only key of the header metadata, ``loralens_fleet``, has the table of contents.
"""
