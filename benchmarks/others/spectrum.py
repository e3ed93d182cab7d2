"""``loralens spectrum`` and ``doctor`` against adaptersentry, which also computes its statistics from singular values.

``doctor`` looks for faults, and adaptersentry for backdoors, so these two times belong to different answers. The
commands are timed as their users call them. The exact part of adaptersentry is also timed alone (no kurtosis, no
hashes, no report), because only this part does the same work as ``spectrum``. adaptersentry does not print singular
values; they are taken from what its own function returns.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import judge
from benchmarks.process import alternate, read_once
from benchmarks.rivals import Rival

CORE = """
import os
for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")  # as its command does
import json, sys
from pathlib import Path
from adaptersentry.features.lowrank_core import compute_core
from adaptersentry.parsers.adapter_config import read_adapter_config, resolve_scale
from adaptersentry.parsers.adapter_file import iter_pairs, open_adapter
file = Path(sys.argv[1])
config = read_adapter_config(file).config
found = {}
for data in iter_pairs(open_adapter(file)):
    scale = resolve_scale(data.pair.base, data.pair.rank, config).scale
    found[data.pair.base] = compute_core(data.a, data.b, scale).sigma.tolist()
print(json.dumps(found))
"""


def run(data: Path, sentry: Rival, *, runs: int) -> dict[str, object]:
    """Time and peak memory on the 7B adapter of rank 16; errors of its singular values, and those at κ = 1000."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic", str(data)], check=True)
    plain, hard = data / "r16", data / "r16-kappa1000"
    commands = {"loralens": _loralens("spectrum", plain), "loralens_doctor": _loralens("doctor", plain)}
    if not sentry.missing:
        scan = [sentry.program("adaptersentry"), "scan", str(plain / "adapter_model.safetensors")]
        commands["adaptersentry"] = [*scan, "--format", "full-json"]
        commands["adaptersentry_fast"] = [*scan, "--format", "full-json", "--mode", "fast"]
        commands["adaptersentry_core"] = _core(sentry, plain)
    read_once(plain, hard)
    figures = alternate(commands, runs=runs)
    tools: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    if sentry.missing:
        tools["adaptersentry"] = sentry.missing
    return {"tools": tools, "largest_relative_error": {where.name: _errors(where, sentry) for where in (plain, hard)}}


def _loralens(verb: str, adapter: Path) -> list[str]:
    return [str(Path(sys.executable).with_name("loralens")), verb, "--json", str(adapter)]


def _core(sentry: Rival, adapter: Path) -> list[str]:
    return [sentry.program("python"), "-c", CORE, str(adapter / "adapter_model.safetensors")]


def _errors(adapter: Path, sentry: Rival) -> dict[str, dict[str, float]]:
    exact = judge.singular_values(adapter)
    modules = _output(_loralens("spectrum", adapter))["adapters"][0]["modules"]
    found = {"loralens": {one["name"]: one["singular_values"] for one in modules}}
    if not sentry.missing:
        theirs = _output(_core(sentry, adapter))
        found["adaptersentry"] = {name.removeprefix("base_model.model."): s for name, s in theirs.items()}
    return {name: errors(values, exact) for name, values in found.items()}


def errors(found: Mapping[str, list[float]], exact: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """The largest relative error over the first singular values of the modules, and over all singular values."""
    assert found.keys() == exact.keys()
    off = np.array([np.abs(np.array(found[name]) - s) / s for name, s in exact.items()])
    return {"of_first": float(f"{off[:, 0].max():.1e}"), "of_any": float(f"{off.max():.1e}")}


def _output(command: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found
