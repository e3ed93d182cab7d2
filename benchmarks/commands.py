"""Single commands on a synthetic adapter and base of a 7B Llama: seconds and peak memory of whole processes."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import alternate, read_once

MAKE = """
import sys
from pathlib import Path
from benchmarks import synthetic, synthetic_model
data = Path(sys.argv[1])
for name, rank, seed in (("r16", 16, 1), ("r16-other", 16, 2), ("r64", 64, 1)):
    synthetic.adapter(data / name, rank=rank, seed=seed)
synthetic_model.model(data / "llama-4-blocks")
synthetic_model.adapter(data / "llama-4-blocks-r16")
"""
MANY = 20_000  # modules of the adapter of a report
MAKE_MANY = """
import sys
import numpy as np
import loralens
rng = np.random.default_rng(0)
def factors():
    return [rng.standard_normal(shape).astype(np.float32) / 10 for shape in ((16, 4), (4, 16))]
names = [f"model.layers.{i // 4}.self_attn.{'qkvo'[i % 4]}_proj" for i in range(int(sys.argv[2]))]
loralens.save(loralens.Adapter(modules={name: loralens.LowRank(*factors(), 2.0) for name in names}), sys.argv[1])
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """The figures of every command, on files in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-c", MAKE, str(data)], check=True)
    many = data / f"{MANY}-modules"
    if not many.exists():
        subprocess.run([sys.executable, "-c", MAKE_MANY, str(many), str(MANY)], check=True)
    one, other, wide = (str(data / name) for name in ("r16", "r16-other", "r64"))
    base, adapter = data / "llama-4-blocks", str(data / "llama-4-blocks-r16")
    with TemporaryDirectory(dir=data) as folder:
        target = ["-o", f"{folder}/adapter", "--overwrite"]
        merged = ["-o", f"{folder}/model", "--overwrite"]
        words = {
            "help": ["--help"],
            "spectrum-r16": ["spectrum", one, "--json"],
            "spectrum-r64": ["spectrum", wide, "--json"],
            "doctor": ["doctor", one, "--json"],
            "similarity": ["similarity", one, other, "--json"],
            "compress": ["compress", wide, "--rank", "16", *target],
            "combine": ["combine", f"{one}:0.7", f"{other}:0.3", "--rank", "16", *target],
            "amplify": ["amplify", adapter, "--base", str(base), "--json"],
            "merge-bare": ["merge", adapter, "--base", str(base), *merged, "--certificate", "none", "--undo", "none"],
            "merge": ["merge", adapter, "--base", str(base), *merged],
            "report-of-many-modules": ["report", str(many), "-o", f"{folder}/page.html", "--overwrite"],
        }
        read_once(data)
        loralens = str(Path(sys.executable).with_name("loralens"))
        figures = alternate({name: [loralens, *arguments] for name, arguments in words.items()}, runs=runs)
    return {name: figure.record() for name, figure in figures.items()}
