"""``loralens report``: what is written where, what is refused, and the numbers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.bases import single
from tests.cli.command import Command
from tests.reporting.adapters import drawn

PNG = b"\x89PNG"


CALL = Command("report")
run, good, refused = CALL.run, CALL.good, CALL.refused


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def first(tmp_path: Path) -> Path:
    loralens.save(drawn(1), tmp_path / "first")
    return tmp_path / "first"


@pytest.fixture
def second(tmp_path: Path) -> Path:
    loralens.save(drawn(2), tmp_path / "second")
    return tmp_path / "second"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base whose weights have the shapes of the adapters."""
    rng = np.random.default_rng(5)
    weights = {
        f"{name}.weight": rng.standard_normal(module.shape).astype(np.float32) for name, module in drawn(1).items()
    }
    return single(tmp_path / "base", weights, config={"model_type": "llama"})


def test_the_page_is_written_into_a_folder_that_it_makes(first: Path, tmp_path: Path) -> None:
    target = tmp_path / "reports" / "x.html"
    result = run(first, "-o", target)
    assert (result.exit_code, result.stdout, result.stderr) == (
        0,
        f"Wrote {target}: first would be 35 % smaller with 99 % of the energy.\n",
        "",
    )
    text = target.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert f"loralens report {first} -o {target}" in re.sub("</?span.*?>", "", text)
    assert names(target.parent) == ["x.html"]


def test_markdown_has_its_pictures_beside_it(first: Path, tmp_path: Path) -> None:
    good(first, "-o", tmp_path / "x.html", "--markdown")
    text = (tmp_path / "x.md").read_text(encoding="utf-8")
    files = sorted(path.name for path in (tmp_path / "x_files").iterdir())
    assert files == [f"{name}-1.png" for name in ("curve", "energy", "ranks", "shares", "spectra")]
    for name in files:
        assert f"(x_files/{name})" in text
        assert (tmp_path / "x_files" / name).read_bytes().startswith(PNG)


def test_checkpoints_of_one_run_have_their_section(tmp_path: Path) -> None:
    adapter = drawn(1)
    for step, strength in ((10, 0.5), (20, 1.0), (30, 1.1)):
        loralens.save(adapter * strength, tmp_path / "run" / f"checkpoint-{step}")
    state = {"global_step": 30, "log_history": [{"step": s, "loss": 3.0 - s / 30} for s in (10, 20, 30)]}
    (tmp_path / "run" / "checkpoint-30" / "trainer_state.json").write_text(json.dumps(state))
    record = CALL.told(tmp_path / "run", "-o", tmp_path / "x.html")
    assert [one["step"] for one in record["run"]["checkpoints"]] == [10, 20, 30]
    assert record["run"]["settled"] == 10
    assert record["run"]["losses"]["loss"][0] == [10, pytest.approx(3.0 - 1 / 3)]
    assert "3 checkpoints of one run" in " ".join(record["summary"])
    assert "From checkpoint to checkpoint" in (tmp_path / "x.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("there", ["x.html", "x.md", "x_files"])
def test_nothing_is_replaced_unasked(first: Path, tmp_path: Path, there: str) -> None:
    if there == "x_files":
        (tmp_path / there).mkdir()
    else:
        (tmp_path / there).write_text("mine")
    assert str(tmp_path / there) in refused(first, "-o", tmp_path / "x.html", "--markdown")
    assert names(tmp_path) == sorted(["first", there])


def test_a_folder_of_other_things_is_not_replaced_even_when_asked(first: Path, tmp_path: Path) -> None:
    (tmp_path / "x_files").mkdir()
    (tmp_path / "x_files" / "thesis.tex").write_text("mine")
    assert "holds files that are not pictures, such as thesis.tex" in refused(
        first, "-o", tmp_path / "x.html", "--markdown", "--overwrite"
    )
    assert (tmp_path / "x_files" / "thesis.tex").read_text() == "mine"


def test_a_folder_of_adapters_that_is_no_run_says_how_to_give_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        loralens.save(drawn(1), tmp_path / "many" / name)
    said = refused(tmp_path / "many", "--json")
    assert f"{tmp_path / 'many'}: is not a training run, and holds 2 adapters" in said
    assert f"give each: loralens report {tmp_path / 'many' / 'a'} {tmp_path / 'many' / 'b'}" in said
