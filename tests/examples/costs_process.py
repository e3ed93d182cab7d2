"""``python -m tests.examples.costs_process WORDS`` is ``python -m rivals.costs WORDS`` where the examples are found."""

import runpy

from tests.examples.conftest import EXAMPLES  # which makes them found

if __name__ == "__main__":
    assert EXAMPLES
    runpy.run_module("rivals.costs", run_name="__main__", alter_sys=True)
