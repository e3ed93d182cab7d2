"""``loralens extract`` against mergekit-extract-lora: time, peak memory, and error beside the least error of the rank.

There are two tuned models: ``tuned`` differs from its base in every direction, ``merged`` in 16 directions and in
rounding noise. Both tools extract rank 16 from the linear layers only.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import judge
from benchmarks.process import alternate, once
from benchmarks.rivals import Rival
from benchmarks.synthetic_pair import RANK

TUNED = ("tuned", "merged")


def run(data: Path, mergekit: Rival, *, runs: int) -> dict[str, object]:
    """Time and peak memory on ``tuned``, errors on both, in the folder of `synthetic_pair` in ``data``."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_pair", str(data / "pair")], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(data / "pair", Path(folder), mergekit, runs=runs)


def compare(pair: Path, folder: Path, mergekit: Rival, *, runs: int) -> dict[str, object]:
    """The same as `run`, for the files in ``pair``, with results in ``folder``."""

    def commands(tuned: str) -> dict[str, list[str]]:
        base, changed = str(pair / "base"), str(pair / tuned)
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

    timed = commands("tuned")
    figures = alternate({name: timed[name] for name in timed if name != "loralens_bf16"}, runs=runs)
    report: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    if mergekit.missing:
        report["mergekit"] = mergekit.missing
    else:
        ratio = figures["mergekit"].seconds / figures["loralens"].seconds
        report["mergekit_over_loralens"] = round(ratio, 1)
    for tuned in TUNED:
        exact = judge.differences(pair / "base", pair / tuned)
        errors = {"least": round(judge.least_error(exact, RANK), 6)}
        for name, command in commands(tuned).items():
            once(command)
            errors[name] = round(judge.error(judge.updates(folder / name), exact), 6)
        report[f"error_{tuned}"] = errors
    report["file_bytes"] = {name: (folder / name / "adapter_model.safetensors").stat().st_size for name in timed}
    return report
