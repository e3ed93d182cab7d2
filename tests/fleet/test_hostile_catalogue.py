"""A catalogue with rows that no update has written: one message, and the next update makes it anew."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

import loralens
from loralens import LoraLensError
from tests.fleet.hostile_indexes import CATALOGUE
from tests.fleet.makers import indexed, save_many

ADAPTER, UNREADABLE = "status = 'adapter' and number = 1", "status = 'unreadable'"
VALUES: tuple[object, ...] = (
    None, -1, 2**62, -(2**63), 1e308, float("inf"), "", "x", "[" * 100_000, "[1e400]", '["a", 1]', "[]", "{}", "[NaN]",
    f"[1{'0' * 400}]", "null", b"\xff", "../up", "/etc/passwd", "a\0b", "[-1]", '[["k", "n", 1]]', '[["k", 1, 2, 3]]',
    "\n\x1b[2J",
)  # fmt: skip
COLUMNS = (
    "number", "path", "name", "real", "bytes", "stamp", "status", "reason", "fix", "added", "indexed", "step", "format",
    "base", "inferred", "signature", "modules", "zero_modules", "extras", "rank", "ranks", "scales", "parameters",
    "frobenius", "effective_rank", "norms", "fingerprint", "findings",
)  # fmt: skip
OF_ALL_FILES = {"path", "name", "real", "bytes", "stamp", "reason", "fix", "added"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and a file that is not one."""
    root = tmp_path_factory.mktemp("fleet")
    save_many(root, 2)
    (root / "bad").mkdir()
    (root / "bad" / "adapter_model.safetensors").write_bytes(bytes(40))
    indexed(root)
    return root


def questions(fleet: loralens.Fleet) -> Iterator[Callable[[], object]]:
    """Everything that a fleet answers without reading files."""
    yield lambda: str(fleet.stats())
    yield lambda: str(fleet.empty())
    yield lambda: fleet.bases().record()
    yield lambda: fleet.runs(sketch=True).record()
    yield lambda: fleet.families(sketch=True).record()
    yield lambda: fleet.near("a000", sketch=True).record()
    yield lambda: [fleet.norms(member) for member in fleet.members()]
    yield lambda: list(fleet.unreadable())
    yield fleet.changes


def check(root: Path, statement: str, value: object) -> None:
    """Change a catalogue: every question is answered or refused in one message, and an update repairs it."""
    fleet = loralens.Fleet.open(root)
    sound = (fleet.home / CATALOGUE).read_bytes()
    try:
        with closing(sqlite3.connect(fleet.home / CATALOGUE)) as connection:
            connection.execute(statement, [value])
            connection.commit()
        for question in questions(loralens.Fleet.open(root)):
            with suppress(LoraLensError):
                question()
        repaired = indexed(root)
        assert [member.name for member in repaired.members()] == ["a000", "a001"]
        assert [len(repaired.norms(member)) for member in repaired.members()] == [4, 4]
        assert len(repaired.unreadable()) == 1
    except sqlite3.IntegrityError:  # the table itself refuses it
        pass
    finally:
        (fleet.home / CATALOGUE).write_bytes(sound)


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("step", ""),
        ("ranks", "[" * 100_000),
        ("ranks", '["a", 1]'),
        ("parameters", None),
        ("norms", "[NaN]"),
        *((name, f"[1{'0' * 400}]") for name in ("scales", "norms")),
        ("path", "a\0b"),
    ],
)
def test_a_value_of_another_kind(column: str, value: object, root: Path) -> None:
    check(root, f"update files set {column} = ? where {ADAPTER}", value)


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_any_value_in_any_column(column: str, root: Path) -> None:
    """Every second value in every second column, and the others in the columns between."""
    for value in VALUES[COLUMNS.index(column) % 2 :: 2]:
        check(root, f"update files set {column} = ? where {ADAPTER}", value)
    if column in OF_ALL_FILES:
        for value in VALUES[:6]:
            check(root, f"update files set {column} = ? where {UNREADABLE}", value)


@pytest.mark.some(3)
@pytest.mark.parametrize("value", ["[" * 100_000, '[["k", "n", 1]]', '[["k", 1, 2, 3]]', "{}", 5, b"\xff"])
def test_a_signature_that_is_none(value: object, root: Path) -> None:
    check(root, "update signatures set modules = ?", value)


@pytest.mark.parametrize("value", [b"\0" * 4351, None])
def test_a_sketch_that_is_none(value: object, root: Path) -> None:
    check(root, "update files set sketch = ?", value)


def test_a_name_in_the_schema_that_is_not_utf_8(root: Path) -> None:
    """SQLite quotes it in its message, which Python cannot decode."""
    fleet = loralens.Fleet.open(root)
    file = fleet.home / CATALOGUE
    sound = file.read_bytes()
    try:
        file.write_bytes(sound.replace(b"viewunreadable", b"viewunr\xe5adable"))
        for question in questions(loralens.Fleet.open(root)):
            with pytest.raises(LoraLensError, match="the catalogue is damaged"):
                question()
        assert loralens.survey(root, content=True).adapters
    finally:
        file.write_bytes(sound)
