"""The examples are scripts: what lies beside them is imported from their own folder."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

EXAMPLES = str(Path(__file__).parents[2] / "examples")

if EXAMPLES not in sys.path:
    sys.path.insert(0, EXAMPLES)

import corpora  # noqa: E402
from corpora import Split  # noqa: E402

FEW = 64
# The modules that call `read_corpus` by a name of their own.
READERS = ("corpora", "rivals.training")


@pytest.fixture(scope="module")
def few_texts() -> Iterator[None]:
    """Every corpus is read once, and has few texts in each part.

    To read, compare and tokenize the thousands that it has takes longer than all that a small study does with some.
    """
    whole = corpora.read_corpus

    @cache
    def read_few(name: str) -> Split:
        split = whole(name)
        return replace(split, train=split.train[:FEW], validation=split.validation[:FEW], held_out=split.held_out[:FEW])

    with pytest.MonkeyPatch.context() as patch:
        for module in map(import_module, READERS):
            patch.setattr(module, "read_corpus", read_few)
        yield
