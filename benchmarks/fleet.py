"""A fleet of 10,000 synthetic adapters: indexing, updating, searching, copies, runs and families, against their truth.

    python -m benchmarks.fleet [FAMILIES]

Fewer families make a smaller fleet of the same kind. Each family has 50 members.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fleet_real
from benchmarks.synthetic_fleet import MEMBERS, Truth, make

FAMILIES = 200
RUNS = 7  # of what takes less than a second
GOALS = {
    "index_seconds": 60,
    "index_peak_mib": 100,
    "bytes_per_adapter": 6144,
    "update_seconds_per_1000": 0.5,
    "near_sketch_ms": 5,
    "near_exact_ms": 250,
    "copies_found": 1.0,
    "copies_false": 0,
    "ari": 0.99,
    "grouping_seconds": 10,
    "grouping_peak_mb": 600,
}
THOUSAND = 1000  # adapters of the fleet that is updated
CHANGED, NEW, GONE = 50, 20, 10
QUERIES = 50


def run(folder: Path, *, families: int = FAMILIES, runs: int = RUNS) -> dict[str, object]:
    """All rows; the fleet is made in ``folder`` if it is not there."""
    fleet = folder / f"fleet-{families}"
    truth = make(fleet, families=families)
    home = folder / f"fleet-{families}-index"
    report: dict[str, object] = {"goals": GOALS, "adapters": len(truth)}
    report["index"] = index(fleet, home, len(truth))
    report["update"] = updates(fleet, folder / "fleet-updated", min(THOUSAND, len(truth)), runs)
    report["near"] = near(fleet, home, truth)
    report["groups"] = in_own_process("groups", fleet, home)
    # Published adapters that `fleet_real` describes, where there are any.
    published = os.environ.get("LORALENS_REAL_FLEET")
    report["published"] = fleet_real.run(Path(published)) if published else "not measured: set LORALENS_REAL_FLEET"
    return report


def index(fleet: Path, home: Path, count: int) -> dict[str, Any]:
    """Seconds and peak memory of the index made anew, in threads and in processes, and its bytes per adapter."""
    found: dict[str, Any] = {}
    code = "import sys, loralens; loralens.Fleet.open(sys.argv[1]).update(sys.argv[2])"
    # The command line takes processes for many files, and `Fleet.update` threads.
    ways = {
        "threads": [sys.executable, "-c", code, str(home), str(fleet)],
        "processes": [sys.executable, "-m", "loralens", "fleet", "index", str(fleet), "-o", str(home), "--quiet"],
    }
    for name, words in ways.items():
        shutil.rmtree(home, ignore_errors=True)
        seconds, peak = _timed(words)
        found[name] = {"seconds": round(seconds, 1), "peak_mib_of_a_process": round(peak, 1)}
    found["bytes_per_adapter"] = round(sum(file.stat().st_size for file in home.iterdir()) / count)
    return found


def _timed(words: Sequence[str]) -> tuple[float, float]:
    """Seconds of a command, and the peak memory of its largest process."""
    # In a child, since the peak of children is kept for the life of a process.
    code = (
        "import resource, subprocess, sys, time\n"
        "start = time.perf_counter()\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, text=True)
    seconds, peak = map(float, done.stdout.split())
    return seconds, peak


def updates(fleet: Path, copied: Path, count: int, runs: int = RUNS) -> dict[str, Any]:
    """Seconds of an update of ``count`` adapters where nothing has changed, and where some have: medians and ranges."""
    nothing, some = zip(*(_two_updates(fleet, copied, count) for _ in range(runs)), strict=True)
    return {
        "adapters": count,
        "runs": runs,
        "nothing_changed_seconds": float(np.median(nothing)),
        "nothing_changed_range": [min(nothing), max(nothing)],
        "some_changed_seconds": float(np.median(some)),
        "some_changed_range": [min(some), max(some)],
    }


def _two_updates(fleet: Path, copied: Path, count: int) -> tuple[float, float]:
    """Both for a new index of copies of ``count`` adapters, which are removed afterwards."""
    import loralens

    shutil.rmtree(copied, ignore_errors=True)
    copied.mkdir(parents=True)
    names = sorted(path.name for path in fleet.iterdir() if path.is_dir())
    step = max(1, len(names) // count)
    chosen = names[::step][:count]
    for name in chosen:
        shutil.copytree(fleet / name, copied / name)
    index = loralens.Fleet.open(copied)
    index.update(copied)
    nothing = _seconds(lambda: index.update(copied))
    few = max(1, count * CHANGED // THOUSAND), max(1, count * NEW // THOUSAND), max(1, count * GONE // THOUSAND)
    for name in chosen[: few[0]]:
        for file in (copied / name).iterdir():
            file.write_bytes(file.read_bytes())
    for name in chosen[few[0] : few[0] + few[1]]:
        shutil.copytree(copied / name, copied / f"{name}-new")
    for name in chosen[-few[2] :]:
        shutil.rmtree(copied / name)
    some = _seconds(lambda: index.update(copied))
    shutil.rmtree(copied)
    return nothing, some


def near(fleet: Path, home: Path, truth: Sequence[Truth]) -> dict[str, Any]:
    """Milliseconds of a search in this process, by sketch and exactly, after one that does not count."""
    import loralens

    index = loralens.Fleet.open(home)
    queries = [fleet / truth[i].name for i in np.random.default_rng(0).integers(len(truth), size=QUERIES)]
    index.near(queries[0])
    by_sketch = [_seconds(lambda path=path: index.near(path, sketch=True)) for path in queries]
    exact = [_seconds(lambda path=path: index.near(path)) for path in queries]
    return {
        "by_sketch_ms": round(1000 * float(np.median(by_sketch)), 2),
        "exact_ms": round(1000 * float(np.median(exact)), 1),
    }


def in_own_process(name: str, fleet: Path, home: Path) -> dict[str, Any]:
    """A function of this module in a process of its own, so that its memory is measured alone."""
    words = [sys.executable, "-m", "benchmarks.fleet", name, str(fleet), str(home)]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def groups(fleet: Path, home: Path) -> dict[str, Any]:
    """Copies, runs and families against the truth, with their seconds and the peak memory of the process."""
    import loralens

    truth = {entry.name: entry for entry in make(fleet, families=len(list(fleet.glob("*/"))) // MEMBERS)}
    index = loralens.Fleet.open(home)
    start = time.perf_counter()
    copies = index.copies()
    copied = time.perf_counter()
    runs, families = index.runs(), index.families()
    grouped = time.perf_counter()
    names = sorted(truth)
    original = {name: truth[name].copy_of or name for name in names}
    found, false = _pairs_found(_labels(copies.groups, names), original, names)
    # A copy in another gauge has another A, so its start cannot be known.
    trained = [name for name in names if not truth[name].copy_of]
    return {
        "copies_found": found,
        "copies_false": false,
        "copies_seconds": round(copied - start, 2),
        "ari_families": round(
            adjusted_rand([truth[n].family for n in names], _labels([family.members for family in families], names)), 4
        ),
        "ari_runs": round(
            adjusted_rand([truth[n].run for n in trained], _labels([run.members for run in runs], trained)), 4
        ),
        "grouping_seconds": round(grouped - copied, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
    }


def _labels(groups: Sequence[Sequence[Any]], names: Sequence[str]) -> list[int]:
    """The number of the group of every adapter; an adapter in none has one of its own."""
    number = {member.name: i for i, group in enumerate(groups) for member in group}
    return [number.get(name, -i - 1) for i, name in enumerate(names)]


def _pairs_found(labels: Sequence[int], original: dict[str, str], names: Sequence[str]) -> tuple[float, int]:
    """The share of copies that are in one group with their original, and how many pairs in a group are no copies."""
    label = dict(zip(names, labels, strict=True))
    copies = [(name, first) for name, first in original.items() if name != first]
    found = sum(label[name] == label[first] for name, first in copies)
    by_label: dict[int, list[str]] = {}
    for name, number in label.items():
        by_label.setdefault(number, []).append(name)
    false = sum(
        original[a] != original[b] for group in by_label.values() for i, a in enumerate(group) for b in group[:i]
    )
    return found / max(1, len(copies)), false


def adjusted_rand(first: Sequence[int], second: Sequence[int]) -> float:
    """The adjusted Rand index of two partitions (Hubert & Arabie 1985)."""
    _, a = np.unique(first, return_inverse=True)
    _, b = np.unique(second, return_inverse=True)
    _, both = np.unique(np.stack([a, b]), axis=1, return_counts=True)

    def pairs(counts: np.ndarray) -> float:
        return float((counts * (counts - 1.0) / 2).sum())

    together, of_a, of_b = pairs(both), pairs(np.bincount(a)), pairs(np.bincount(b))
    expected = of_a * of_b / max(1.0, len(a) * (len(a) - 1) / 2)
    largest = (of_a + of_b) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 4)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        print(json.dumps(groups(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        count = int(sys.argv[1]) if len(sys.argv) > 1 else FAMILIES
        print(json.dumps(run(Path(__file__).parent / "data", families=count), indent=1))
