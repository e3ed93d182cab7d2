"""``loralens combine`` beside a base model, on a terminal, and interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from tests import bases, reference
from tests.cli.command import Command
from tests.tolerances import DORA_FILE

Q = "model.layers.0.self_attn.q_proj"
KEY = "base_model.model.{}.lora_magnitude_vector"

run, done = Command().run, Command().good


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return bases.single(tmp_path / "base", bases.tensors(np.float32, size=1.0))


def weights() -> dict[str, np.ndarray]:
    held = bases.tensors(np.float32, size=1.0)
    return {name: held[f"{name}.weight"].astype(np.float64) for name in bases.MODULES}


def saved(folder: Path, seed: int, *, dora: bool = True) -> Path:
    """An adapter of all modules, DoRA or not, with trained lengths."""
    rng, modules, extra = np.random.default_rng(seed), {}, {}
    for name, W in weights().items():
        B, A = (0.3 * rng.standard_normal(shape).astype(np.float32) for shape in ((6, 2), (2, 4)))
        modules[name] = LowRank(B, A, 2.0)
        if dora:
            m = np.linalg.norm(W + modules[name].dense(), axis=1) * (1 + 0.1 * rng.standard_normal(6))
            extra[KEY.format(name)] = Extra("magnitude", name, LazyArray.of(m.astype(np.float32)))
    loralens.save(Adapter(modules=modules, extra=extra), folder)
    return folder


def changes(folder: Path) -> dict[str, np.ndarray]:
    """W' − W of every module, by the definition."""
    adapter, found = loralens.load(folder), {}
    lengths = {e.module: e.tensor.read().astype(np.float64) for e in adapter.extra.values() if e.role == "magnitude"}
    for name, W in weights().items():
        D = adapter[name].dense()
        found[name] = reference.dora(W, D, lengths[name]) - W if name in lengths else D
    return found


@pytest.mark.parametrize("first", [True, False])
def test_dora_with_its_base_is_exact_and_stays_dora(base: Path, tmp_path: Path, first: bool) -> None:
    pair = saved(tmp_path / "a", 1, dora=first), saved(tmp_path / "b", 2, dora=not first)
    result = done("combine", f"{pair[0]}:0.7", f"{pair[1]}:-0.4", "--base", base, "-o", tmp_path / "out")
    assert "1 of 2 adapters is DoRA; the result is DoRA too, exact for this base" in result.stderr
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["use_dora"] is True
    a, b, found = (changes(folder) for folder in (*pair, tmp_path / "out"))
    for name, W in weights().items():
        expected = 0.7 * a[name] - 0.4 * b[name]
        assert np.linalg.norm(found[name] - expected) < 4 * DORA_FILE * np.linalg.norm(W)  # factors are float32 too


def test_dora_cut_and_by_a_recipe_and_by_short_forms(base: Path, tmp_path: Path) -> None:
    pair = saved(tmp_path / "a", 3), saved(tmp_path / "b", 4)
    record = json.loads(done("combine", *pair, "--base", base, "--rank", 1, "--json", "-o", tmp_path / "cut").stdout)
    a, b, cut = (changes(folder) for folder in (*pair, tmp_path / "cut"))
    for module in record["modules"]:
        S, R = (x[module["name"]] for x in ({name: a[name] + b[name] for name in a}, cut))
        assert module["rank"] == 1
        assert module["error_to_sum"] == pytest.approx(np.linalg.norm(R - S) / np.linalg.norm(S), abs=1e-5)
    done("combine", "--recipe", tmp_path / "cut", "--base", base, "-o", tmp_path / "again")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("cut", "again")]
    assert files[0] == files[1]
    done("scale", pair[0], "--by", 0.5, "--base", base, "-o", tmp_path / "half")
    half = changes(tmp_path / "half")
    assert all(np.linalg.norm(half[n] - 0.5 * a[n]) < 4 * DORA_FILE * np.linalg.norm(W) for n, W in weights().items())
    done("subtract", pair[0], pair[0], "--base", base, "-o", tmp_path / "none")
    none = loralens.load(tmp_path / "none")
    assert not none.extra
    assert all(not m.B.any() for m in none.modules.values())


def test_dora_without_its_base_says_the_way_out(tmp_path: Path, base: Path) -> None:
    pair = saved(tmp_path / "a", 5), saved(tmp_path / "b", 6)
    for arguments, message in (
        ([*pair], "--base"),
        ([pair[0], "--rank", 1], "loralens compress"),
        ([*pair, "--base", base, "--method", "ties"], "--method sum or average"),
        ([*pair, "--base", tmp_path / "a"], str(tmp_path / "a")),
    ):
        result = run("combine", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr
        assert "\n  fix: " in result.stderr
        assert not (tmp_path / "out").exists()
    assert done("combine", pair[0], "-o", tmp_path / "same").exit_code == 0  # alone, as it is
    assert changes(tmp_path / "same")[Q].tobytes() == changes(pair[0])[Q].tobytes()


def test_what_the_method_is_told_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    for arguments, message in (
        (["--method", "wrong"], "ties (trim each update to its largest entries"),
        (["--method", "ties", "--density", "2"], "in (0, 1]"),
        (["--set", "beta=1"], "sum has no option beta"),
    ):
        result = run("combine", tmp_path / "nowhere", *arguments, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert message in result.stderr


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the shell of the tests ignores it
from {module} import {owner}
plain, count = {owner}.{name}, [0]
def stops(*args, **options):
    count[0] += 1
    if count[0] == 3:
        os.kill(os.getpid(), signal.SIGINT)
    return plain(*args, **options)
{owner}.{name} = {wrapped}
from loralens.cli.main import run
run()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "owner", "name", "wrapped"),
    [
        ("loralens.core.joint", "Joint", "of", "staticmethod(stops)"),  # while modules are combined
        ("loralens.core", "joint", "times", "stops"),  # while factors are made and written
    ],
)
def test_interrupted_it_leaves_nothing_behind(
    small: Path, tmp_path: Path, module: str, owner: str, name: str, wrapped: str
) -> None:
    code = INTERRUPTED.format(module=module, owner=owner, name=name, wrapped=wrapped)
    arguments = ["combine", str(small), f"{small}:0.5", "-o", str(tmp_path / "out")]
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert found.returncode == 130, found.stderr
    assert found.stderr.strip() == "interrupted"
    assert not list(tmp_path.iterdir())
