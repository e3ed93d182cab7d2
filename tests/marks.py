"""Cases of a test of which most are slow tests, as they take long together and a few of them show the same."""

from collections.abc import Iterable
from typing import Any

import pytest


def slow_except(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases for ``parametrize``; all but the quick ones are slow."""
    cases = list(cases)
    unknown = [case for case in quick if case not in cases]
    assert not unknown, f"no such cases: {unknown}"
    return [pytest.param(case, marks=() if case in quick else pytest.mark.slow) for case in cases]
