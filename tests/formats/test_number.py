"""Numbers as JSON has them."""

from typing import Any

import pytest

from loralens.formats.files.json_text import finite_number


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0, 0.0), (-3, -3.0), (0.5, 0.5), (1e308, 1e308), (2**1023, 2.0**1023), (10**400, None), (-(10**400), None),
        (float("inf"), None), (float("nan"), None), (True, None), ("1", None), (None, None), ([1], None),
    ],
)  # fmt: skip
def test_only_what_float64_holds_is_a_number(value: Any, found: float | None) -> None:
    assert finite_number(value) == found
    assert found is None or type(finite_number(value)) is float
