"""``python -m tests.import_orders SEED …`` imports all modules of the package, in an order drawn from each seed.

Before each order it takes the modules of the package out again; what they import of others stays. It prints a line for
each order: whether there were many modules, and the verbs that are then no functions.
"""

import pkgutil
import random
import sys
from importlib import import_module


def imported_in_order(seed: int) -> list[object]:
    """What is printed for one order."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "loralens"]:
        del sys.modules[name]
    package = import_module("loralens")
    names = [module.name for module in pkgutil.walk_packages(package.__path__, "loralens.")]
    random.Random(seed).shuffle(names)
    for name in names:
        if name != "loralens.__main__":
            import_module(name)
    verbs = (*import_module("loralens.verbs").VERBS, "plot", "load", "save")
    return [len(names) > 300, *(verb for verb in verbs if not callable(getattr(package, verb, None)))]


if __name__ == "__main__":
    for seed in map(int, sys.argv[1:]):
        print(*imported_in_order(seed))
