"""``loralens report`` of an adapter with very many small modules; the time grows with their number."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import alternate

GOAL = 15.0  # seconds for the larger adapter
FEW, MANY = 2_000, 20_000  # modules
RANK, SIDE = 4, 16

MAKE = """
import sys
import numpy as np
import loralens
path, count, rank, side = sys.argv[1], *map(int, sys.argv[2:])
rng = np.random.default_rng(0)
def factors():
    return [rng.standard_normal(shape).astype(np.float32) / 10 for shape in ((side, rank), (rank, side))]
kinds = ("q_proj", "k_proj", "v_proj", "o_proj")
modules = {f"model.layers.{i // 4}.self_attn.{kinds[i % 4]}": loralens.LowRank(*factors(), 2.0) for i in range(count)}
loralens.save(loralens.Adapter(modules=modules), path, overwrite=True)
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Seconds and peak memory of whole processes, and how much longer the page of ten times as many modules takes."""
    loralens = str(Path(sys.executable).with_name("loralens"))
    with TemporaryDirectory(dir=data) as folder:
        commands = {}
        for count in (FEW, MANY):
            adapter = data / f"{count}-modules"
            subprocess.run([sys.executable, "-c", MAKE, str(adapter), str(count), str(RANK), str(SIDE)], check=True)
            page = Path(folder) / f"{count}.html"
            commands[f"{count}"] = [loralens, "report", str(adapter), "-o", str(page), "--overwrite"]
        figures = alternate(commands, runs=runs)
    ratio = figures[f"{MANY}"].seconds / figures[f"{FEW}"].seconds
    records = {f"modules_{name}": figure.record() for name, figure in figures.items()}
    return {"goal_seconds": GOAL, **records, "ten_times_as_many": round(ratio, 2)}
