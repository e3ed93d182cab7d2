"""Golden output: what every command says and writes, recorded before a change and compared after it.

    python -m tests.golden record FOLDER      # before
    python -m tests.golden compare FOLDER     # after

`arguments` alone knows how the command line spells verbs and options, `product` alone knows where the project keeps
its entry point and its version, `cases` and its neighbours are the table. A change of names is followed up there, and
recordings made before it stay comparable.
"""
