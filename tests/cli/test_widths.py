"""Every command that prints a table, under terminals of three widths: no number is cut, what is left out is named.

A command is added by one line in `CASES`.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.core import Scaling
from loralens.tables import Tabular, lay_out
from loralens.verbs import VERBS
from tests.bases import single
from tests.cli.command import Command
from tests.marks import slow_except
from tests.verbs.shown import WIDTHS, check_tables_fit

NAMES = [
    f"model.layers.{block}.{kind}"
    for block in (0, 1, 10)
    for kind in ("self_attn.q_proj", "self_attn.v_proj", "mlp.experts.0.down_proj")
]
SHAPE = (48, 40)
RANK = 4

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
    "survey --content": "survey many --content",
    "combine": "combine first:0.5 second:-0.25 --rank 4 --dry-run",
    "subtract": "subtract first second --dry-run",
    "interpolate": "interpolate first second --at 0.25 --dry-run",
    "negate": "negate first --dry-run",
    "scale": "scale first --by 2 --dry-run",
    "equal": "equal first second",
    "extract": "extract --base base --tuned merged --rank 4 --dry-run",
}
WITHOUT = {
    "calibrate",
    "convert",
    "doctor",
    "drop",
    "report",
    "schema",
    "train",
    "unmerge",
}  # what they print are sentences
RUNNING = {
    "evaluate",
    "behave",
    "explain",
    "prove",
    "served",
}  # run a model; tests/verbs/test_running.py looks at their tables


def adapter(seed: int, strength: float = 0.01) -> loralens.Adapter:
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
        loralens.save(adapter(seed), folder / name)
        loralens.save(adapter(seed), folder / "many" / f"experiments-with-{name}" / "checkpoint-of-the-last-epoch")
    for step in (10, 20, 30):
        loralens.save(adapter(0, 0.01 * step), folder / "run" / f"checkpoint-{step}")
    state = {"global_step": 30, "log_history": [{"step": s, "loss": 3.0 - s / 30} for s in (10, 20, 30)]}
    (folder / "run" / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    rng = np.random.default_rng(9)
    single(folder / "base", {f"{name}.weight": rng.standard_normal(SHAPE).astype(ml_dtypes.bfloat16) for name in NAMES})
    loralens.merge(folder / "first", base=folder / "base", output=folder / "merged")
    return folder


def test_every_command_that_prints_a_table_is_among_the_cases() -> None:
    assert {words.split()[0] for words in CASES.values()} == {*VERBS} - WITHOUT - RUNNING


@pytest.mark.parametrize("name", slow_except(CASES, "spectrum", "merge"))
def test_tables_fit_and_are_whole(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the result fit, and COLUMNS lays them out for its width."""
    words, results = CASES[name].split(), list[Tabular]()
    monkeypatch.chdir(folder)

    def keep(result: Any, *_: Any, **__: Any) -> None:
        results.append(result)

    with monkeypatch.context() as patch:
        patch.setattr("loralens.cli.commands.show", keep)
        Command().run(*words)
    (result,) = results
    check_tables_fit(result)
    for width in WIDTHS:
        monkeypatch.setenv("COLUMNS", str(width))
        lines = Command().run(*words).stdout.splitlines()
        assert max(map(len, lines)) <= width
        for table in result.tables():
            brief, left_out = table.brief()
            if brief.rows:
                layout = lay_out(brief, width)
                assert {layout.heading.rstrip(), *map(str.rstrip, layout.lines)} <= {line.rstrip() for line in lines}
            assert not left_out or left_out in " ".join(lines)
