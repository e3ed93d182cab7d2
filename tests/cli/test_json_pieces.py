"""JSON that is printed in pieces is the text of `json.dumps`."""

import json
from typing import Any

import click
import pytest

from loralens.cli.show import ECHOED, json_pieces, show_json
from loralens.version import __version__

ROWS = [{"name": f"m{i}", "σ": [1.5, float("nan"), None], "inner": {"a": {"b": i}}} for i in range(5)]


@pytest.mark.parametrize(
    "value",
    [
        {"modules": ROWS, "total": {"modules": 5, 3: "x", None: True}, "empty": [], "none": {}, "tuple": (1, (2, 3))},
        {},
        [],
        [1, 'a\n"\\\u2028\ud800', None],
        "text",
        1e300,
        [[[[1]]], {"a": [{"b": [{}]}]}],
    ],
)
def test_the_pieces_are_those_of_the_whole_text(value: Any) -> None:
    assert "".join(json_pieces(value)) == json.dumps(value)


def test_every_row_is_a_piece() -> None:
    assert json.dumps(ROWS[3]) in list(json_pieces({"modules": ROWS}))


def test_a_long_record_is_printed_a_part_at_a_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts: list[str] = []
    monkeypatch.setattr(click, "echo", lambda text="", nl=True: parts.append(text + "\n" * nl))
    rows = [{"name": "x" * 1000}] * 300
    show_json({"rows": rows})
    assert "".join(parts) == json.dumps({"loralens": __version__, "rows": rows}) + "\n"
    assert len(parts) > 4
    assert max(map(len, parts)) < ECHOED + 2000
