"""Run every benchmark, print the ratios, and keep them with the machine and versions: ``make bench``."""

import json
import os
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import (
    amplify,
    combine,
    compress,
    intruders,
    merge,
    others,
    pairwise,
    similarity,
    spectrum,
    switchboard,
    train,
)

HERE = Path(__file__).parent
RUNS = int(os.environ.get("LORALENS_BENCH_RUNS", "7"))


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("loralens", "numpy", "ml-dtypes", "safetensors", "click")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Measure, print and write ``benchmarks/results.json``."""
    report = {
        "machine": machine(),
        "spectrum": spectrum.run(HERE / "data", runs=RUNS),
        "amplify": amplify.run(HERE / "data", runs=RUNS),
        "similarity": similarity.run(HERE / "data", runs=RUNS),
        "combine": combine.run(HERE / "data", runs=RUNS),
        "compress": compress.run(HERE / "data", runs=RUNS),
        "intruders": intruders.run(HERE / "data", runs=RUNS),
        "pairwise": pairwise.run(HERE / "data", runs=RUNS),
        "merge": merge.run(HERE / "data", runs=RUNS),
        "switchboard": switchboard.run(runs=RUNS),
        "others": others.run(HERE / "data", runs=RUNS),
        "train": train.run(runs=RUNS),
    }
    text = json.dumps(report, indent=2) + "\n"
    (HERE / "results.json").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
