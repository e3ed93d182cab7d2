"""The command line: the only part of the package that prints.

`commands` calls verbs and shows what they return. `derive` makes a command of the signature and the text of a function,
and `table` has what these cannot say.
"""
