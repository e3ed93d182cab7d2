"""Run every benchmark, print the ratios, and keep them with the machine and versions: ``make bench``.

Name parts to run only these: ``python -m benchmarks commands train``. The kept results of the other parts stay.
``LORALENS_BENCH_RUNS`` says how often commands run, and ``LORALENS_BENCH_DATA`` names the folder for their files.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from benchmarks import commands, fleet, train, train_language
from benchmarks.others import combine as methods
from benchmarks.others import together

HERE = Path(__file__).parent
DATA, RESULTS = Path(os.environ.get("LORALENS_BENCH_DATA", HERE / "data")), HERE / "results.json"
RUNS = int(os.environ.get("LORALENS_BENCH_RUNS", "7"))
# An installed package is compiled. Without this, every process would compile the files that were changed last.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def machine() -> dict[str, object]:
    """The machine and the versions that the numbers were measured with."""
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu,
        "avx512": any("avx512f" in line for line in _cpuinfo()),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("loralens", "numpy", "ml-dtypes", "safetensors", "click")},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


PARTS: dict[str, Callable[[], dict[str, object]]] = {
    "commands": lambda: commands.run(DATA, runs=RUNS),
    "others": lambda: together.run(DATA, runs=RUNS),
    "methods": lambda: methods.run(DATA / "others", runs=min(RUNS, 3)),
    "train": lambda: train.run(runs=RUNS),
    "train-language": lambda: train_language.run(turns=3 * RUNS),
    "fleet": lambda: fleet.run(DATA, runs=RUNS),
}


def main() -> None:
    """Measure, print and write into ``benchmarks/results.json``, each part with the machine it was measured on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=", ".join(PARTS))
    wanted = parser.parse_args().parts or list(PARTS)
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in wanted:
        kept[name] = {"machine": machine()} | PARTS[name]()
        sys.stdout.write(json.dumps({name: kept[name]}, indent=2) + "\n")
        RESULTS.write_text(json.dumps({name: kept[name] for name in PARTS if name in kept}, indent=2) + "\n")


if __name__ == "__main__":
    main()
