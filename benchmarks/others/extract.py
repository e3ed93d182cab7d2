"""``loralens extract`` against mergekit-extract-lora: time, peak memory, and error beside the least error of the rank.

There are two tuned models: ``tuned`` differs from its base in every direction, ``merged`` in 16 directions and in
rounding noise. Both tools extract rank 16 from the linear layers only.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.process import alternate, once, read_once
from benchmarks.rivals import Rival
from benchmarks.synthetic_pair import RANK, make_tiny

TUNED = ("tuned", "merged")


def run(data: Path, mergekit: Rival, *, runs: int) -> dict[str, object]:
    """Time and peak memory on ``tuned``, errors on both, in the folder of `synthetic_pair` in ``data``."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_pair", str(data / "pair")], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(data / "pair", Path(folder), mergekit, runs=runs)


def compare(pair: Path, folder: Path, mergekit: Rival, *, runs: int) -> dict[str, object]:
    """The same as `run`, for the files in ``pair``, with results in ``folder``."""

    def commands(tuned: str, models: Path = pair) -> dict[str, list[str]]:
        base, changed = str(models / "base"), str(models / tuned)
        ours = [str(Path(sys.executable).with_name("loralens")), "extract", "--base", base, "--tuned", changed]
        ours += ["--rank", str(RANK), "--json", "--overwrite", "-o"]
        found = {"loralens": [*ours, str(folder / "loralens")]}
        found["loralens_bf16"] = [*ours, str(folder / "loralens_bf16"), "--dtype", "bf16"]
        if not mergekit.missing:
            theirs = ["--base-model", base, "--model", changed, "--out-path", str(folder / "mergekit")]
            theirs += ["--max-rank", str(RANK), "--skip-undecomposable", "-e", "lm_head", "-e", "embed_tokens"]
            program = mergekit.program("mergekit-extract-lora")
            found["mergekit"] = ["env", "HF_HUB_OFFLINE=1", program, *theirs]
        return found

    timed = {name: command for name, command in commands("tuned").items() if name != "loralens_bf16"}
    read_once(pair / "base", pair / "tuned")
    figures = alternate(timed, runs=runs, warm=commands("tuned", make_tiny(folder / "tiny")))
    errors = {}
    for tuned in TUNED:
        found = commands(tuned)
        for name, command in found.items():
            if tuned != TUNED[0] or name not in timed:  # the last timed run has left its result
                once(command)
        exact = judge.differences(pair / "base", pair / tuned)
        errors[tuned] = {"least": judge.least_error(exact, RANK)}
        errors[tuned] |= {name: judge.error(judge.updates(folder / name), exact) for name in found}
        errors[tuned] = {name: round(error, 6) for name, error in errors[tuned].items()}
    tools: dict[str, object] = {name: one.record() | {"error": errors[TUNED[0]][name]} for name, one in figures.items()}
    if mergekit.missing:
        tools["mergekit"] = mergekit.missing
    sizes = {name: (folder / name / "adapter_model.safetensors").stat().st_size for name in timed}
    return {"tools": tools} | {f"error_{tuned}": found for tuned, found in errors.items()} | {"file_bytes": sizes}
