"""``loralens similarity``: two 7B adapters against ``loralens spectrum`` of both, and a hundred small ones.

The JSON of the hundred has every pair, module by module; their CSV has the pairs alone.
"""

import subprocess
import sys
from pathlib import Path

from benchmarks.process import alternate

GOAL = 3.0  # times spectrum
MAKE = """
import sys
from pathlib import Path
from benchmarks.synthetic import adapter
for rank in (16, 64):
    adapter(Path(sys.argv[1]) / f"r{rank}", rank=rank)
    adapter(Path(sys.argv[1]) / f"r{rank}-other", rank=rank, seed=1000 + rank)
"""


COUNT, GOAL_MANY = 100, 10.0  # adapters, and seconds for all pairs of them
MAKE_MANY = """
import sys
import numpy as np
import loralens
rng = np.random.default_rng(0)
def factors():
    return [rng.standard_normal(shape).astype(np.float32) for shape in ((768, 8), (8, 768))]
for t in range(int(sys.argv[2])):
    modules = {f"model.layers.{i}.self_attn.q_proj": loralens.LowRank(*factors()) for i in range(12)}
    loralens.save(loralens.Adapter(modules=modules), f"{sys.argv[1]}/{t:03}", overwrite=True)
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory of whole processes, on the adapters in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-c", MAKE, str(data)], check=True)
    loralens = str(Path(sys.executable).with_name("loralens"))
    report: dict[str, object] = {"goal": GOAL}
    for rank in (16, 64):
        pair = [str(data / f"r{rank}"), str(data / f"r{rank}-other")]
        figures = alternate(
            {
                "spectrum": [loralens, "spectrum", "--json", *pair],
                "similarity": [loralens, "similarity", "--json", *pair],
            },
            runs=runs,
        )
        ratio = figures["similarity"].seconds / figures["spectrum"].seconds
        records = {name: figure.record() for name, figure in figures.items()}
        report[f"r{rank}"] = records | {"similarity_ratio": round(ratio, 2)}
    many = data / f"{COUNT}-adapters"
    many.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-c", MAKE_MANY, str(many), str(COUNT)], check=True)
    adapters = [str(path) for path in sorted(many.iterdir())]
    figures = alternate(
        {"csv": [loralens, "similarity", "--csv", *adapters], "json": [loralens, "similarity", "--json", *adapters]},
        runs=runs,
    )
    report["hundred"] = {"goal_seconds": GOAL_MANY, **{name: figure.record() for name, figure in figures.items()}}
    return report
