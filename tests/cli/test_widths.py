"""Every command that prints a table, under terminals of several widths: no number is cut, what is left out is named.

The numbers of a row are compared with ``--json`` or ``--csv`` of the same command, and where neither has them (medians
of kinds) with what the verb returned. A command is added by one line in `CASES`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from pathlib import Path
from typing import Any, NamedTuple

import click
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import loralens
from loralens.cli.main import main
from loralens.core.lowrank import LowRank, Scaling
from loralens.tables.numbers import MINUS
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Table
from loralens.verbs import VERBS
from tests import models
from tests.cli.terminals import Terminals

pytestmark = pytest.mark.slow

WIDTHS = (60, 80, 100, 140, 200)
NAMES = [
    f"model.layers.{block}.{kind}"
    for block in (0, 1, 10)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.0.down_proj")
]
SHAPE = (48, 40)
RANK = 4

# Name → the words of a command; what it writes is made anew, or not at all.
CASES = {
    "spectrum": "spectrum first second",
    "spectrum --base": "spectrum first --base base",
    "similarity of one": "similarity first",
    "similarity of two": "similarity first second",
    "similarity of three": "similarity first second third",
    "trajectory": "trajectory run",
    "amplify": "amplify first --base base --rank 1 --rank 4",
    "intruders": "intruders first --base base --no-cache",
    "compress": "compress first --rank 2 --dry-run",
    "curve": "curve first",
    "merge": "merge first --base base --dry-run --measure",
    "verify": "verify merged --base base --adapter first",
    "inspect": "inspect first",
    "survey": "survey many",
    "combine": "combine first:0.5 second:-0.25 --rank 4 --dry-run",
    "subtract": "subtract first second --dry-run",
    "interpolate": "interpolate first second --at 0.25 --dry-run",
    "negate": "negate first --dry-run",
    "scale": "scale first --by 2 --dry-run",
    "equal": "equal first second",
    "extract": "extract --base base --tuned merged --rank 4 --dry-run",
    "evaluate": "evaluate llama-adapter --model llama --task causal-lm --data texts.jsonl --threads 1 --device cpu",
    "behave": "behave llama-adapter llama-other --model llama --data texts.jsonl --threads 1 --device cpu",
}
WITHOUT = {"calibrate", "convert", "doctor", "drop", "report", "train", "unmerge"}  # what they print are sentences
RUNNING = ("evaluate", "behave")  # run a model, for which torch must be installed


@dataclass(frozen=True)
class Shown:
    """A command: what the verb returned, and what its options for machines print."""

    words: Sequence[str]
    result: Tabular
    json: Any
    csv: Sequence[Mapping[str, str]]


class Cells(NamedTuple):
    """A table as a terminal has it: heading, cells by heading in every line, and the note."""

    headings: list[str]
    rows: list[list[str]]
    note: str


def adapter(seed: int, strength: float = 1.0) -> loralens.Adapter:
    rng = np.random.default_rng(seed)
    modules = {}
    for i, name in enumerate(NAMES):
        B = strength * (1 + 300 * (i == 0)) * rng.standard_normal((SHAPE[0], RANK)) * 0.4 ** np.arange(RANK)
        A = rng.standard_normal((RANK, SHAPE[1]))
        modules[name] = LowRank(B.astype(np.float32), A.astype(np.float32), 2.0, scaling=Scaling("alpha/r", 8, RANK))
    return loralens.Adapter(modules=modules, base_model="tiny/base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters, a run of three checkpoints, a base, and the base with the first adapter merged in."""
    folder = tmp_path_factory.mktemp("widths")
    for seed, name in enumerate(("first", "second", "third")):
        loralens.save(adapter(seed, 0.01), folder / name)
        loralens.save(
            adapter(seed, 0.01), folder / "many" / f"experiments-with-{name}" / "checkpoint-of-the-last-epoch"
        )
    for step in (10, 20, 30):
        loralens.save(adapter(0, 0.01 * step), folder / "run" / f"checkpoint-{step}")
    state = {"global_step": 30, "log_history": [{"step": s, "loss": 3.0 - s / 30} for s in (10, 20, 30)]}
    (folder / "run" / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    rng = np.random.default_rng(9)
    (folder / "base").mkdir()
    weights = {f"{name}.weight": rng.standard_normal(SHAPE).astype(ml_dtypes.bfloat16) for name in NAMES}
    save_file(weights, folder / "base" / "model.safetensors")
    (folder / "base" / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    words = ["merge", str(folder / "first"), "--base", str(folder / "base"), "-o", str(folder / "merged")]
    merged = CliRunner().invoke(main, words)
    assert merged.exit_code == 0, merged.stderr
    return folder


def write_models(folder: Path) -> None:
    """A model, two adapters of it, and texts."""
    pytest.importorskip("transformers")
    llama = models.llama()
    models.folder(llama, folder / "llama")
    models.saved(models.adapter(llama, ("q_proj", "up_proj")), folder / "llama-adapter")
    models.saved(models.adapter(llama, ("down_proj",), seed=1), folder / "llama-other")
    models.jsonl(folder / "texts.jsonl")


@pytest.fixture(scope="module")
def terminals(folder: Path) -> Iterator[Terminals]:
    running = Terminals(folder)
    yield running
    running.close()


@pytest.fixture(scope="module")
def shown(folder: Path) -> Any:
    """Name of a case → what it says to machines, run once."""
    known: dict[str, Shown] = {}

    def of(name: str) -> Shown:
        if name in RUNNING and not (folder / "llama").exists():
            write_models(folder)
        if name not in known:
            known[name] = _shown(CASES[name].split(), folder)
        return known[name]

    return of


def _shown(words: Sequence[str], folder: Path) -> Shown:
    results: list[Tabular] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        command = main.get_command(click.Context(main), words[0])
        options = {option for param in command.params for option in param.opts}
        texts = {option: _output([*words, option]) for option in ("--json", "--csv") if option in options}
        patch.setattr("loralens.cli.commands.show", lambda result, rows: results.append(result))
        CliRunner().invoke(main, list(words))
    (result,) = results
    return Shown(words, result, json.loads(texts["--json"]), list(csv.DictReader(io.StringIO(texts.get("--csv", "")))))


def _output(words: Sequence[str]) -> str:
    done = CliRunner().invoke(main, list(words))
    assert done.exit_code in (0, 1), done.output
    return done.stdout


# ---------------------------------------------------------------- reading a table as a person does


def cells_of(block: str, table: Table[Any]) -> Cells:
    """The cells of one table, found by where its headings stand: words and numbers are two spaces apart."""
    titles = [column.title for column in table.shown]
    lines = block.split("\n")
    heads = [re.findall(r"\S+(?: \S+)*", line) for line in lines]
    place = next(i for i, found in enumerate(heads) if found and _is_part(found, titles))
    headings, last = heads[place], place + 1 + len(table.rows)
    spans = [match.span() for match in re.finditer(r"\S+(?: \S+)*", lines[place])]
    sides = {column.title: column.align for column in table.shown}
    rows = []
    for line in lines[place + 1 : last]:
        row, end = [], 0
        for heading, (start, stop) in zip(headings, spans, strict=True):
            if sides[heading] == "left":
                text = re.match(r"(?:\S+(?: \S+)*)?", line[start:])
                row.append(text[0] if text else "")
                end = start + len(row[-1])
            else:
                text = re.search(r"(?:(?<=\s\s)|^)\S+(?: \S+)*$", line[end:stop])
                row.append(text[0].strip() if text else "")
                end = stop
        rows.append(row)
    return Cells(headings, rows, " ".join(line for line in lines[last:] if line))


def _is_part(found: Sequence[str], titles: Sequence[str]) -> bool:
    """Whether these are headings of the table, in its order, its first one among them."""
    rest = iter(titles)
    return found[0] == titles[0].strip() and all(any(title.strip() == one for title in rest) for one in found)


# ---------------------------------------------------------------- numbers, as they are printed and as they are

PRINTED = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
PLAIN = (int, float, str, list, tuple, type(None))  # values that say their numbers; others are whole if their text is
FACTORS = {"%": 100, "kB": 1e-3, "MB": 1e-6, "GB": 1e-9}


def numbers_in(value: Any) -> list[float]:
    """All numbers of a value."""
    if isinstance(value, bool) or value is None:
        return []
    if isinstance(value, int | float):
        return [float(value)]
    if isinstance(value, str):
        return [float(text.replace(",", "")) for text in PRINTED.findall(value)]
    inner = value.values() if isinstance(value, Mapping) else value
    return [number for one in inner for number in numbers_in(one)]


def is_rounded(text: str, values: Sequence[float]) -> bool:
    """Whether every number of the text is one of the values to the digits that are printed, in the unit behind it."""
    text = text.replace(MINUS, "-")
    for match in PRINTED.finditer(text):
        digits, _, power = match[0].replace(",", "").partition("e")
        places = len(digits.partition(".")[2])
        unit = 10.0 ** (int(power or 0) - places)
        factor = next((by for name, by in FACTORS.items() if text[match.end() :].strip().startswith(name)), 1)
        if text[: match.start()].strip() in (">", "<"):
            unit *= 10
        if not any(abs(float(match[0].replace(",", "")) - factor * value) <= unit / 2 * (1 + 1e-6) for value in values):
            return False
    return True


def test_what_is_rounded() -> None:
    assert is_rounded("36,864", [36864.0])
    assert not is_rounded("36,86", [36864.0])
    assert is_rounded("0.007318", [0.0073184])
    assert not is_rounded("0.00", [0.0073184])
    assert is_rounded("12.3 %", [0.12345])
    assert is_rounded("110.2 kB", [110_184])
    assert is_rounded("48 × 40", [48, 40])
    assert not is_rounded("48 × 4", [48, 40])
    assert is_rounded("−0.5", [-0.5])
    assert not is_rounded("−0.5", [0.5])


def values_for(column: Column[Any], row: Any, table: Table[Any], shown: Shown) -> list[float]:
    """What a cell may show: numbers of its key in JSON objects or CSV rows of its name, else those of the result."""
    names = [one for one in table.shown if one.align == "left" or one is table.shown[0]]
    of_json = [
        reach(one, path_of(column))
        for one in objects(shown.json)
        if all(reach(one, path_of(name)) == name.value(row) for name in names)
    ]
    of_csv = [
        one.get(column.name) for one in shown.csv if all(one.get(name.name) == str(name.value(row)) for name in names)
    ]
    return numbers_in(of_json) or numbers_in(of_csv) or numbers_in(column.value(row))


def path_of(column: Column[Any]) -> tuple[str, ...]:
    return (column.key,) if isinstance(column.key, str) else column.key


def objects(value: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in a value."""
    if isinstance(value, Mapping):
        yield value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for one in inner:
        yield from objects(one)


def reach(value: Any, path: Sequence[str]) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


# ---------------------------------------------------------------- the tests


def test_every_command_that_prints_a_table_is_among_the_cases() -> None:
    assert {words.split()[0] for words in CASES.values()} == {*VERBS} - WITHOUT


@pytest.mark.parametrize("name", CASES)
def test_tables_fit_and_are_true(name: str, shown: Any, terminals: Terminals) -> None:
    case: Shown = shown(name)
    for width in WIDTHS:
        # The model has been run for `shown`; another import of torch and a run for every width take half a minute.
        result = case.result if name in RUNNING else None
        check_output(terminals.run(width, case.words, result), width, case)


def check_output(output: str, width: int, case: Shown) -> None:
    """The tables of a command as it wrote them to a terminal so wide."""
    tables = [table for table in case.result.tables() if table.rows]
    assert tables
    blocks = iter(re.sub(r"\x1b\[[\d;]*m", "", output).split("\n\n"))
    if case.result.conclusion():
        # It breaks between words, so that the words are those of the sentences.
        assert next(blocks).split()[-3:] == case.result.conclusion()[-1].split()[-3:]
    for table in tables:
        table, left_out = table.brief()
        if not (table.rows or left_out):
            continue
        block = next(blocks)
        if not table.rows:
            assert block == left_out
            continue
        assert [line for line in block.split("\n") if len(line) > width] == [], width
        if headed(table):
            cells = cells_of(block, table)
            if left_out:
                told = f"{left_out} (--verbose shows every row)"
                assert cells.note.startswith(told)
                cells = cells._replace(note=cells.note.removeprefix(told).strip())
            check_table(cells, width, table, case)


def check_table(cells: Cells, width: int, table: Table[Any], case: Shown) -> None:
    """The column of the name is there, those that are not are named, and every cell is true."""
    columns = columns_of(cells, table)
    assert columns[0] is table.shown[0]
    left_out = [column.title for column in headed(table) if column not in columns]
    note = f"not shown here: {', '.join(left_out)} (a wider terminal, --csv and --json show them)"
    assert cells.note == (note if left_out else ""), width
    names, shortened = ([row[0] for row in rows] for rows in (whole_cells(table), cells.rows))
    assert len({*shortened}) == len({*names}), width  # names that differ stay different
    for texts, row in zip(cells.rows, table.rows, strict=True):
        for text, column in zip(texts, columns, strict=True):
            check_cell(text, column, row, table, case)


def whole_cells(table: Table[Any]) -> list[list[str]]:
    return [[column.cell(row) for column in table.shown] for row in table.rows]


def headed(table: Table[Any]) -> list[Column[Any]]:
    """The columns with a heading that one can read: that of the names in a matrix has none."""
    return [column for column in table.shown if column.title.strip()]


def columns_of(cells: Cells, table: Table[Any]) -> list[Column[Any]]:
    """The columns of the headings, in order; of several with one title that whose cells these are."""
    columns: list[Column[Any]] = []
    remaining = headed(table)
    for i, heading in enumerate(cells.headings):
        alike = [column for column in remaining if column.title.strip() == heading]
        texts = [row[i] for row in cells.rows]
        column = next((one for one in alike if texts == [one.cell(row).strip() for row in table.rows]), alike[0])
        columns.append(column)
        remaining = remaining[remaining.index(column) + 1 :]
    return columns


def check_cell(text: str, column: Column[Any], row: Any, table: Table[Any], case: Shown) -> None:
    """A number is whole and true; of a word nothing is another than an ellipsis says."""
    whole = column.cell(row)
    if column.align == "left":
        pieces = [re.escape(piece) for piece in text.split("…")]
        assert re.fullmatch(".*".join(pieces), whole.strip(), re.DOTALL), text
        return
    assert text == whole.strip()
    if isinstance(column.value(row), PLAIN):
        assert is_rounded(text, values_for(column, row, table, case)), (column.title, text)


def test_a_heading_of_two_columns_is_told_apart() -> None:
    """The reader of this file: columns by their places, empty cells too."""
    columns: tuple[Column[Any], ...] = (
        Column("name", lambda row: row[0], "module", align="left"),
        Column("a", lambda row: row[1], "by chance", lambda value: "" if value is None else f"{value:.2f}"),
        Column("b", lambda row: row[2], "its σ"),
    )
    table = Table("title", columns, [("x y", None, 12), ("zzzzzzzzzzzz", 0.5, 7)])
    text = "title\nmodule        by chance  its σ\nx y                         12\nzzzzzzzzzzzz       0.50      7\n"
    rows = [["x y", "", "12"], ["zzzzzzzzzzzz", "0.50", "7"]]
    assert cells_of(text, table) == (["module", "by chance", "its σ"], rows, "")
    assert isclose(sum(values_for(columns[2], table.rows[0], table, Shown([], Tabular(), {}, []))), 12)
