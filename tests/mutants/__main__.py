"""Make every mistake of the table in a copy of the project, and see its tests fail.

Real adapters that this machine may have are hidden, so that what is caught here is caught in a fresh clone.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutant import ROOT, Mutant, mutated
from tests.mutants.table import MUTANTS

COPIED = ("loralens", "tests", "docs", "examples", "benchmarks", "reports", "pyproject.toml", "README.md", "Makefile")
COPIED += ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "GLOSSARY.md")
LIMIT = 300  # seconds after which tests that hang on a mistake have noticed it
GOAL = 0.95  # share of the mistakes that must be noticed


def main(words: Sequence[str] | None = None) -> int:
    """0 where enough mistakes are noticed and the tests pass without any, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutants of functions whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2 at most)")
    given = parser.parse_args(words)
    chosen = [one for one in MUTANTS if not given.names or any(name in one.function for name in given.names)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(given.jobs):
            copies.put(_copy(Path(folder) / str(job)))
        with ThreadPoolExecutor(given.jobs) as pool:
            needed = sorted({one.test for one in chosen})
            sound = list(
                pool.map(lambda tests: _clean(copies, tests), [needed[i :: given.jobs] for i in range(given.jobs)])
            )
            if not all(sound):
                print("the tests fail without any mistake: nothing can be said of mutants", file=sys.stderr)
                return 1
            noticed = list(pool.map(lambda one: _noticed(copies, one), chosen))
    missed = [one for one, seen in zip(chosen, noticed, strict=True) if not seen]
    for one in missed:
        print(f"survives: {one.label}\n    test: {one.test}")
    share = sum(noticed) / max(len(noticed), 1)
    print(f"{sum(noticed)} of {len(noticed)} mistakes noticed ({share:.1%}) in {time.monotonic() - started:.0f} s")
    return 0 if share >= GOAL else 1


def _copy(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "_build", "data"))
        elif source.exists():
            shutil.copy(source, target / name)
    return target


def _clean(copies: "SimpleQueue[Path]", tests: Sequence[str]) -> bool:
    """Whether tests pass as the project is."""
    copy = copies.get()
    try:
        return not tests or _run(copy, tests, limit=10 * LIMIT) == 0
    finally:
        copies.put(copy)


def _noticed(copies: "SimpleQueue[Path]", one: Mutant) -> bool:
    copy = copies.get()
    path, changed = mutated(one)
    target = copy / path.relative_to(ROOT)
    original = target.read_bytes()
    try:
        _write(target, changed)
        code = _run(copy, [one.test], limit=LIMIT)
    finally:
        _write(target, original)
        copies.put(copy)
    if code == 5:
        raise LookupError(f"{one.label}: no test was run")
    print(f"{'noticed ' if code else 'SURVIVES'}  {one.label}", flush=True)
    return code != 0


def _write(path: Path, source: bytes) -> None:
    """Write a module; what Python compiled of it before is removed, as its time stamp has only whole seconds."""
    path.write_bytes(source)
    for stale in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        stale.unlink()


def _run(copy: Path, tests: Sequence[str], *, limit: float) -> int:
    """The exit code of pytest in a copy; 1 where it took too long."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "LORALENS_REAL_ADAPTERS": str(copy / "absent")}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=line", *tests]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return 1
    if done.returncode not in (0, 1):
        print(done.stdout.decode(errors="replace")[-2000:], file=sys.stderr)
    elif done.returncode and limit > LIMIT:
        print(done.stdout.decode(errors="replace")[-4000:], file=sys.stderr)
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
