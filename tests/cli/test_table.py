"""Tables on a terminal: whatever its width, no digit of a number is cut off."""

import io
import re

import pytest

from loralens.cli.table import Column, Table, show

NAMES = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(3)]
NUMBERS = [f"+0.{i}75" for i in range(10)]


class Terminal(io.StringIO):
    """A stream that says that somebody looks at it."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
@pytest.mark.parametrize("columns", [4, 6, 10])
def test_every_name_and_number_can_be_read(width: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    headings = [Column("module", "left"), *(Column(f"value {i}") for i in range(columns))]
    show(Table("three modules", headings, [[name, *NUMBERS[:columns]] for name in NAMES]))
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    for word in (*NUMBERS[:columns], *(f"value {i}" for i in range(columns))):
        assert text.count(word) == (3 if word in NUMBERS else 1)
    if width < 16 + 9 * columns:  # the rest is no place for a name
        for name in NAMES:
            assert f"{name}\n" in text
