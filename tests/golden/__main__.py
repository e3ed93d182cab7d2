"""Record golden output, or compare with it.

python -m tests.golden record FOLDER
python -m tests.golden compare FOLDER [--tolerance 1e-6] [--allow-added]
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.golden.call import Case
from tests.golden.cases import CASES
from tests.golden.difference import Difference, differences
from tests.golden.run import records
from tests.golden.sources import copy_to, missing

FOLDER = Path("out/golden")
INDEX = "golden.json"  # marks a folder as a record of ours
SLOWEST = 5  # cases that are named, so that the whole stays short
SHOWN = 12  # differences of a case that are printed


def main(words: Sequence[str] | None = None) -> int:
    """0 where all is as it was, 1 where something is not, 2 where the folder is no place for this."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help=f"where the record is (default: {FOLDER})")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: 2 at most)")
    parser.add_argument("--cases", action="append", metavar="GLOB", help="only cases of these names; repeatable")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of numbers, on another machine (default: 0)")
    parser.add_argument("--allow-added", action="store_true", help="keys and files that are new are no difference")
    parser.add_argument("--show", type=int, default=SHOWN, metavar="N", help=f"differences of a case ({SHOWN})")
    given = parser.parse_args(words)
    globs = given.cases or ["*"]
    chosen = [case for case in CASES if any(fnmatch.fnmatchcase(case.name, glob) for glob in globs)]
    started = time.monotonic()
    if given.action == "record":
        code = record(given.folder, chosen, given.jobs)
    else:
        code = compare(
            given.folder, chosen, given.jobs, tolerance=given.tolerance, allow_added=given.allow_added, show=given.show
        )
    print(f"{time.monotonic() - started:.0f} s")
    return code


def record(folder: Path, cases: Sequence[Case], jobs: int) -> int:
    """Run cases and keep what they say and write."""
    if folder.exists() and any(folder.iterdir()) and not (folder / INDEX).is_file():
        print(f"{folder}: holds something else than a record; name an empty folder", file=sys.stderr)
        return 2
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    able = _able(cases)
    names = []
    for found in _run(able, jobs):
        names.append(found["case"])
        file = unfinished / _file_name(found["case"])
        file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (unfinished / INDEX).write_text(json.dumps({"cases": sorted(names)}, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"{len(names)} cases recorded, {len(cases) - len(able)} skipped")
    return 0


def compare(
    folder: Path, cases: Sequence[Case], jobs: int, *, tolerance: float, allow_added: bool, show: int = SHOWN
) -> int:
    """Run the cases of a record again and list where they differ."""
    if not (folder / INDEX).is_file():
        print(f"{folder}: holds no record; make one: python -m tests.golden record {folder}", file=sys.stderr)
        return 2
    recorded = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["cases"])
    gone = sorted(recorded - {case.name for case in CASES})
    able = _able([case for case in cases if case.name in recorded])
    left_out = len(recorded) - len(gone) - len(able)
    changed = added = 0
    for found in _run(able, jobs):
        before = json.loads((folder / _file_name(found["case"])).read_text(encoding="utf-8"))
        after = json.loads(json.dumps(found, ensure_ascii=False))
        apart = list(differences(before, after, tolerance=tolerance))
        news = [one for one in apart if one.kind == "added"]
        others = [one for one in apart if one.kind != "added"]
        changed, added = changed + bool(others), added + bool(news)
        _print(found, others, news, show)
    for name in gone:
        print(f"{name}: recorded, but no longer in the table")
    print(f"{len(able)} cases compared: {changed} differ, {added} with additions, {len(gone)} gone from the table")
    if left_out:
        print(f"{left_out} recorded cases were not compared: skipped here, or not among --cases")
    return int(bool(changed or gone or (added and not allow_added)))


def _able(cases: Iterable[Case]) -> list[Case]:
    """Cases that can run here; the others are named."""
    able = []
    for case in cases:
        if reason := missing(case.sources):
            print(f"skipped: {case.name}: {reason}")
        else:
            able.append(case)
    return able


def _run(cases: Sequence[Case], jobs: int) -> Iterable[dict[str, Any]]:
    slow: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        place = Path(folder).resolve()
        copy_to(place, {source for case in cases for source in case.sources})
        for found, seconds in records(cases, place, jobs):
            slow.append((seconds, found["case"]))
            yield found
    longest = ", ".join(f"{name} {seconds:.0f} s" for seconds, name in sorted(slow, reverse=True)[:SLOWEST])
    print(f"slowest: {longest}")


def _file_name(case: str) -> str:
    return case.replace("/", "~") + ".json"


def _print(found: dict[str, Any], others: list[Difference], news: list[Difference], show: int) -> None:
    if not others and not news:
        return
    print(f"{found['case']}: {len(others)} differences, {len(news)} additions")
    for one in [*others[:show], *news[:show]]:
        print(f"    {one}")
    if (more := max(len(others) - show, 0) + max(len(news) - show, 0)) > 0:
        print(f"    … and {more} more (--show)")
    for number, call in enumerate(found["calls"]):
        if any(one.path.startswith(f"calls[{number}]") for one in (*others, *news)):
            print(f"    calls[{number}] is: loralens {' '.join(call['command'])}")


if __name__ == "__main__":
    sys.exit(main())
