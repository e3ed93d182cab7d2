"""``loralens similarity`` of two 7B adapters, every module, both sides, against ``loralens spectrum`` of both."""

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
    return report
