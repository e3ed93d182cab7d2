"""loralens compared with tools that do part of the same: adaptersentry, mergekit and PEFT, alternated in one run.

Rivals are installed under ``benchmarks/data/others``; PEFT is the one of the development environment. Tools that are
on no package index are not run. Every part is a process of its own: the memory that a process holds when it starts
another one counts as memory of the new process, and the judge holds much.

    python -m benchmarks.others [spectrum|extract|combine] [--runs N]
"""

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import others_combine, others_extract, others_spectrum
from benchmarks.rivals import REQUIREMENTS, rival

MOST = 3  # runs at most: the slowest commands take many seconds
PARTS = ("spectrum", "extract", "combine")


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Every comparison; the row of a rival that cannot be installed says so."""
    rivals = {name: rival(name, data / "others") for name in REQUIREMENTS}
    versions = {name: one.missing or one.requirement for name, one in rivals.items()}
    versions["peft"] = f"peft=={version('peft')}" if find_spec("peft") else "not measured: peft is not installed"
    return {"versions": versions} | {part: _process(part, data, runs=min(runs, MOST)) for part in PARTS}


def _process(part: str, data: Path, *, runs: int) -> Any:
    command = [sys.executable, "-m", "benchmarks.others", part, "--runs", str(runs), "--data", str(data)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def measure(part: str, data: Path, *, runs: int) -> dict[str, object]:
    """The result of one of `PARTS`, measured in this process."""
    if part == "spectrum":
        return others_spectrum.run(data, rival("adaptersentry", data / "others"), runs=runs)
    if part == "extract":
        return others_extract.run(data / "others", rival("mergekit", data / "others"), runs=runs)
    return others_combine.run(data / "others", runs=runs)


def main() -> None:
    """Print these comparisons, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--runs", type=int, default=MOST)
    parser.add_argument("--data", type=Path, default=Path(__file__).parent / "data")
    given = parser.parse_args()
    found = measure(given.part, given.data, runs=given.runs) if given.part else run(given.data, runs=given.runs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
