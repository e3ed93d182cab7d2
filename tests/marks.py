"""What keeps the quick run quick: cases that are slow tests, fewer examples, and packages that are imported late."""

from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from math import ceil
from typing import Any

import pytest
from hypothesis import settings

HUNDRED = 100  # examples that a property has where its test does not say how many


def slow_except(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases for ``parametrize``; all but the quick ones are slow."""
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def examples(count: int, parent: settings | None = None, **more: Any) -> settings:
    """Settings of a property with so many examples, of which a run tries the same share as of a hundred."""
    share = settings.default.max_examples / HUNDRED
    return settings(parent, max_examples=ceil(count * share), **more)


def installed(*names: str) -> bool:
    """Whether all of these distributions are."""
    try:
        return all(map(distribution, names))
    except PackageNotFoundError:
        return False


class Later:
    """A package that is imported when something of it is used for the first time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks everything in a file of tests whether it is a fixture
            raise AttributeError(name)
        return getattr(import_module(self._name), name)


def when_used(name: str) -> Any:
    """A package whose import takes seconds, for the top of a file of tests, which are skipped where it is missing.

    Every process of a run reads every file of tests; so only those import the package that run tests with it.
    """
    if find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)
    return Later(name)
