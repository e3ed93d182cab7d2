"""Adapters of different bases, and a base that is not the adapter's: said by every verb that holds them together."""

import json
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests import bases
from tests.cli.command import Command
from tests.conftest import small_adapter

call = Command()
NUMBERS = count()  # of targets
CASED, UNCASED = "bert-base-cased", "google-bert/bert-base-uncased"
SEVERAL = {
    "similarity": "similarity {one} {two}",
    "similarity of three": "similarity {one} {two} {three}",
    "combine": "combine {one} {two} --dry-run",
    "interpolate": "interpolate {one} {two} --at 0.5 --dry-run",
    "subtract": "subtract {one} {two} --dry-run",
    "equal": "equal {one} {two}",
    "trajectory": "trajectory {one} {two}",
    "doctor": "doctor {one} {two}",
    "merge": "merge {one} {two} --base {base} --dry-run",
}
WITH_BASE = {
    "merge": "merge {one} --base {base} --dry-run",
    "verify": "verify {base} --base {base} --adapter {one}",
    "amplify": "amplify {one} --base {base} --no-top",
    "intruders": "intruders {one} --base {base} --no-cache",
    "spectrum": "spectrum {one} --base {base}",
    "compress": "compress {one} --base {base} --rank 1 --dry-run",
    "convert": "convert {one} --base {base} --to peft -o {out} --dry-run",
    "curve": "curve {one} --base {base}",
    "combine": "combine {one} --base {base} --dry-run",
    "drop": "drop {one} -m v_proj --base {base} --dry-run",
    "inspect": "inspect {one} --base {base}",
    "doctor": "doctor {one} --base {base}",
    "unmerge": "unmerge {base} --adapter {one} -o {out}",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two names of one base, and adapters that say different names of it."""
    folder = tmp_path_factory.mktemp("made")
    held = bases.tensors(np.float32, size=1.0)
    bases.single(folder / "bert-base-uncased", held)
    bases.single(folder / "base", held)
    named = {"one": CASED, "two": UNCASED, "three": CASED, "spelt": f"org/{CASED.upper()}-GGUF", "none": None}
    for i, (name, model) in enumerate(named.items()):
        adapter = small_adapter()
        modules = {key: loralens.LowRank(module.B + i, module.A, module.scale) for key, module in adapter.items()}
        loralens.save(replace(adapter, modules=modules, base_model=model), folder / name)
    return folder


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "home")


def said(words: str, home: Path, **names: str) -> str:
    places = {name: home / names.get(name, name) for name in ("one", "two", "three", "base")}
    result = call.run(*words.format(out=home / f"out{next(NUMBERS)}", **places).split())
    assert result.exit_code in (0, 1), result.output
    assert result.exit_code == 0 or words.startswith(("equal", "verify")), result.output
    return result.output


@pytest.mark.parametrize("verb", SEVERAL)
def test_several_adapters_of_two_bases(verb: str, home: Path) -> None:
    told = said(SEVERAL[verb], home)
    assert told.count("adapters of 2 base models, as their names are of two models") == 1
    assert f"{CASED}: {home / 'one'}" in told
    assert f"{UNCASED}: {home / 'two'}" in told


@pytest.mark.some(4)
@pytest.mark.parametrize("verb", SEVERAL)
@pytest.mark.parametrize("other", ["spelt", "none"])
def test_several_of_one_base_under_two_spellings_or_none(verb: str, other: str, home: Path) -> None:
    assert "base model" not in said(SEVERAL[verb], home, two=other)


@pytest.mark.some(4)
@pytest.mark.parametrize("verb", WITH_BASE)
def test_a_base_that_is_not_the_adapters(verb: str, home: Path) -> None:
    told = said(WITH_BASE[verb], home, base="bert-base-uncased")
    assert told.count(f"it names {CASED} as its base, and ") == 1, told
    assert "their names are of two models" in told


@pytest.mark.some(4)
@pytest.mark.parametrize("verb", WITH_BASE)
def test_a_base_that_may_be_the_adapters(verb: str, home: Path) -> None:
    """A folder of any name; the same name spelt otherwise; an adapter that names none; a configuration that agrees."""
    folder = home / "bert-base-uncased"
    for one, base in (("one", "base"), ("two", "bert-base-uncased"), ("none", "bert-base-uncased")):
        assert "as its base" not in said(WITH_BASE[verb], home, one=one, base=base)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_name_or_path": CASED}))
    assert "as its base" not in said(WITH_BASE[verb], home, one="one", base="bert-base-uncased")
