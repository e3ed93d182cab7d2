"""Tables of results for other programs: every verb's result becomes CSV, LaTeX, HTML, and a data frame."""

import csv
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.verbs import VERBS
from tests.cli.command import Command
from tests.conftest import ROOT

# Verbs that run a model or ask a server; their results are of the same class.
RUNNING = {"train", "evaluate", "behave", "calibrate", "explain", "prove", "served"}
CALLS: dict[str, Callable[[], Any]] = {
    "inspect": lambda: loralens.inspect("chat"),
    "convert": lambda: loralens.convert("chat", to="mlx", dtype="bf16"),
    "equal": lambda: loralens.equal("chat", "code"),
    "spectrum": lambda: loralens.spectrum("chat"),
    "similarity": lambda: loralens.similarity("poems", "terse"),
    "trajectory": lambda: loralens.trajectory("run"),
    "survey": lambda: loralens.survey("run"),
    "amplify": lambda: loralens.amplify("chat", base="base"),
    "intruders": lambda: loralens.intruders("chat", base="base", modules=["q_proj"], cache=False),
    "doctor": lambda: loralens.doctor("wide"),
    "compress": lambda: loralens.compress("wide", rank=4),
    "curve": lambda: loralens.curve("chat"),
    "combine": lambda: loralens.combine("chat", "code"),
    "negate": lambda: loralens.negate("chat"),
    "scale": lambda: loralens.scale("chat", by=0.5),
    "subtract": lambda: loralens.subtract("chat", "code"),
    "interpolate": lambda: loralens.interpolate("chat", "code", at=0.3),
    "drop": lambda: loralens.drop("wide", modules=["k_proj"]),
    "merge": lambda: loralens.merge("chat", base="base", output="merged", overwrite=True),
    "verify": lambda: loralens.verify(_merged(), base="base", adapter="chat"),
    "unmerge": lambda: loralens.unmerge(_merged(), output="restored", overwrite=True),
    "extract": lambda: loralens.extract("base", _merged(), rank=8),
    "report": lambda: loralens.report("chat", "code"),
}


def _merged() -> str:
    if not Path("merged").exists():
        loralens.merge("chat", base="base", output="merged")
    return "merged"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("tables") / "playground"
    subprocess.run([sys.executable, ROOT / "docs" / "playground.py", target], check=True)
    return target


def test_no_verb_is_forgotten() -> None:
    assert set(CALLS) | RUNNING == set(VERBS) - {"schema"}


@pytest.mark.some(2)
@pytest.mark.parametrize("verb", CALLS)
def test_every_result_is_a_table_for_other_programs(verb: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = CALLS[verb]()
    heading, *rows = csv.reader(StringIO(result.to_csv()))
    assert rows
    assert len(set(heading)) == len(heading)
    assert all(len(row) == len(heading) for row in rows)
    latex = result.to_latex()
    # As many columns as sides, in every line; an empty one is no table for LaTeX.
    sides = re.findall(r"\\begin\{tabular\}\{([lr]+)\}", latex)
    assert len(sides) == latex.count(r"\end{tabular}") >= 1
    # pdflatex stops at letters that its fonts lack. Titles stand in comments, which it skips.
    assert [line for line in latex.splitlines() if not (line.startswith("% ") or line.isascii())] == []
    assert "<" in result._repr_html_()
    result.to_csv("table.csv")
    result.to_latex(Path("table.tex"))
    assert (Path("table.csv").read_text(encoding="utf-8"), Path("table.tex").read_text(encoding="utf-8")) == (
        result.to_csv(), latex
    )  # fmt: skip
    for write, name in ((result.to_csv, "table.csv"), (result.to_latex, "table.tex")):
        Path(name).write_text("mine")
        Path(name).chmod(0o600)
        with pytest.raises(loralens.OptionError, match=rf"{name}: exists\n  fix: .*overwrite=True"):
            write(name)
        assert Path(name).read_text() == "mine"
        write(name, overwrite=True)
        assert (Path(name).read_text(encoding="utf-8"), Path(name).stat().st_mode & 0o777) == (write(), 0o600)
        with pytest.raises(loralens.FormatError, match="cannot be written"):
            write(Path("nowhere", name))
        Path(name).unlink()
    assert not list(folder.glob(".table*"))
    if verb != "report":  # its tables hold functions
        assert pickle.loads(pickle.dumps(result)).to_csv() == result.to_csv()
    printed = str(result)
    assert all(sentence in printed for sentence in (*result.conclusion(), *result.sentences()))
    assert "\n\n\n" not in printed
    pandas = pytest.importorskip("pandas")
    frame = result.to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert (list(frame.columns), len(frame)) == (heading, len(rows))


def test_a_report_has_the_modules_of_every_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    result = loralens.report("chat", "code", base="base", intruders=False)
    rows = list(csv.DictReader(StringIO(result.to_csv())))
    expected = [
        (adapter["label"], module["name"]) for adapter in result.record()["adapters"] for module in adapter["modules"]
    ]
    assert [(row["adapter"], row["name"]) for row in rows] == expected
    frobenius = [module["frobenius"] for adapter in result.record()["adapters"] for module in adapter["modules"]]
    assert [float(row["frobenius"]) for row in rows] == pytest.approx(frobenius)


@pytest.mark.parametrize(
    ("verb", "words"), [("spectrum", ["chat"]), ("similarity", ["poems", "terse"]), ("trajectory", ["run"])]
)
def test_print_shows_what_the_command_prints(
    verb: str, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    told = Command(verb).good(*words).stdout
    assert f"{getattr(loralens, verb)(*words)}" == told.replace(", -v shows all", "").strip()
