"""The command line: the only part of the package that prints.

A command declares its options, calls the verb of the same name and shows the result. It passes the values of its
options on as ``**keywords``, since click tells a type checker nothing about them; ``tests/verbs/test_parity.py``
compares their names, types and defaults with the parameters of the verb.
"""
