"""Columns: paths to values, and values as plain data."""

from math import inf, nan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from loralens.tables import Column, Table
from loralens.tables.table import shape_columns

ROW = SimpleNamespace(
    module=SimpleNamespace(shape=(3, 4), s=np.array([2.0, nan]), path=Path("a")),
    phi={"in": 0.5},
    names=["q", "v"],
    listing=lambda: ["first"],
    none=None,
    far=inf,
)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("module.shape", [3, 4]),
        ("module.shape.1", 4),
        ("module.s", [2.0, None]),
        ("module.path", "a"),
        ("phi.in", 0.5),
        ("phi.out", None),
        ("names.len", 2),
        ("listing.0", "first"),
        ("none.rank", None),
        ("far", None),
    ],
)
def test_a_path_leads_to_plain_data(path: str, value: object) -> None:
    column: Column[Any] = Column("key", path)
    assert Table("", [column], [ROW]).records() == [{"key": value}]


def test_people_see_what_json_does_not_have() -> None:
    column: Column[Any] = Column("far", "far", "far", str, json=False, csv=False)
    assert column.cell(ROW) == "inf"


def test_a_shape_is_a_list_in_json_and_two_columns_in_csv() -> None:
    columns = shape_columns("module.shape", "out × in")
    assert Table("", columns, [ROW]).records() == [{"shape": [3, 4]}]
    assert [(column.name, column.value(ROW)) for column in columns if column.csv] == [("out", 3), ("in", 4)]
