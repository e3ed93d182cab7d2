"""LoRA and the alternatives that its paper compares it with: same model, texts, number of steps and seeds.

    python examples/alternatives.py --quick                        train, measure and report, small, in a minute
    python examples/alternatives.py --out out/alternatives         train every method (finished runs are kept)
    python examples/alternatives.py --out out/alternatives --measure    step time, memory, latency: on a quiet machine
    python examples/alternatives.py --out out/alternatives --report     table.md and figure.png of the results so far
    python examples/alternatives.py --out out/tuning --tune        choose the learning rates

The paper is Hu et al. 2021 (arXiv:2106.09685), Tables 1 to 4. Needs the packages that `loralens train --demo` needs,
and peft.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported: waiting threads must not spin

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from corpora import CORPORA
from rivals.costs import LATENCIES, measure
from rivals.kept import finished, keep
from rivals.methods import METHODS, Method, method_named
from rivals.report import Results, figure, read_results, table
from rivals.training import train_lora, train_one

from loralens.charts.figure_file import save_figure
from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.atomic import atomic_file

__all__ = [
    "METHODS",
    "Method",
    "Results",
    "figure",
    "finished",
    "keep",
    "main",
    "measure",
    "read_results",
    "table",
    "train_lora",
    "train_one",
]

NAMES = tuple(method.name for method in METHODS)
QUICK = {
    "out": Path("out/alternatives-quick"),
    "corpora": ("reuters-r8",),
    "seeds": (0,),
    "steps": 24,
    "batch": 8,
    "length": 32,
    "limit": 64,
    "turns": 1,
    "rounds": [4, 1],
    "memory": False,
}
FULL = {
    "out": Path("out/alternatives"),
    "corpora": ("20newsgroups", "reuters-r8"),
    "seeds": (0, 1),
    "steps": 120,
    "batch": 32,
    "length": 64,
    "limit": None,
    "turns": 8,
    "rounds": [60, 12],
    "memory": True,
}
Job = tuple[Path, dict[str, Any]]  # the file of the result, and the arguments of the function that makes it


def jobs_of(folder: Path, given: argparse.Namespace) -> list[Job]:
    """One job for every method, corpus and seed."""
    return [
        (
            folder / "runs" / f"{corpus}.{method}.seed{seed}.json",
            _recipe(given) | {"method": method, "corpus": corpus, "seed": seed, "lr": method_named(method).lr},
        )
        for corpus in given.corpora
        for seed in given.seeds
        for method in given.methods
    ]


def tuning_of(folder: Path, given: argparse.Namespace) -> list[Job]:
    """One job for every method and learning rate of its grid, judged on the validation texts."""
    return [
        (
            folder / "tuning" / f"{corpus}.{method}.lr{lr:g}.seed{seed}.json",
            _recipe(given) | {"method": method, "corpus": corpus, "seed": seed, "lr": lr, "part": "validation"},
        )
        for corpus in given.corpora
        for seed in given.seeds
        for method in given.methods
        for lr in method_named(method).grid
    ]


def _recipe(given: argparse.Namespace) -> dict[str, Any]:
    names = ("steps", "batch", "length", "threads", "limit")
    return {"part": "held_out", **{name: getattr(given, name) for name in names}}


def make(jobs: Sequence[Job], *, at_once: int) -> list[dict[str, Any]]:
    """The results of all jobs, in their order; missing results are made, and each is written when it is done."""
    missing = [(path, told) for path, told in jobs if finished(path, told) is None]
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done", flush=True)
    # LoRA is what `loralens train` trains; its runs are grids.
    ours = [job for job in missing if method_named(job[1]["method"]).targets]
    others = [job for job in missing if job not in ours]
    folder = jobs[0][0].parent.parent / f"{jobs[0][0].parent.name}-lora"
    results = chain(train_lora([told for _, told in ours], folder, jobs=at_once), _made(others, at_once))
    for (path, _), made in zip([*ours, *others], results, strict=True):
        keep(path, made)
        print(f"  {path.stem}: accuracy {made['accuracy']:.3f}, {made['seconds']:.0f} s", flush=True)
    return [json.loads(path.read_text(encoding="utf-8")) for path, _ in jobs]


def _made(jobs: Sequence[Job], at_once: int) -> Iterator[dict[str, Any]]:
    if at_once == 1 or len(jobs) < 2:
        yield from (train_one(**told) for _, told in jobs)
        return
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_told, [told for _, told in jobs])


def _told(told: dict[str, Any]) -> dict[str, Any]:
    return train_one(**told)


def best_rates(tuned: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Method → the learning rate with the best mean accuracy over corpora and seeds; in a tie, the lower rate."""
    seen: dict[tuple[str, float], list[float]] = {}
    for run in tuned:
        seen.setdefault((run["method"], run["lr"]), []).append(run["accuracy"])
    best: dict[str, float] = {}
    mean: Callable[[tuple[str, float]], float] = lambda key: sum(seen[key]) / len(seen[key])  # noqa: E731
    for name in dict.fromkeys(name for name, _ in seen):
        best[name] = max(sorted(key for key in seen if key[0] == name), key=mean)[1]
    return best


def tune(folder: Path, given: argparse.Namespace) -> None:
    """Print the best learning rate of each method."""
    for name, lr in best_rates(make(tuning_of(folder, given), at_once=given.jobs)).items():
        edge = " (at the edge of its grid)" if lr in (method_named(name).grid[0], method_named(name).grid[-1]) else ""
        print(f"{name}: {lr:g}{edge}; in use: {method_named(name).lr:g}")


def measure_all(folder: Path, given: argparse.Namespace) -> None:
    """Measure the methods one after the other, without those that were already measured with these settings."""
    for name in given.methods:
        path = folder / "costs" / f"{name}.json"
        told = {setting: getattr(given, setting) for setting in ("batch", "length", "turns", "rounds", "threads")}
        if finished(path, {"method": name, **told}) is None:
            made = measure(name, **told, memory=given.memory)
            keep(path, made)
            print(f"  {name}: {told_of(made)}", flush=True)


def told_of(cost: dict[str, Any]) -> str:
    """A measurement in one line."""
    latencies = []
    for form, found in cost["latency"].items():
        ratios = [f"{found[str(count)]['ratio']:.2f} × at {count}" for count in LATENCIES]
        latencies.append(f"{form} {', '.join(ratios)}")
    return f"step {cost['step']['ratio']:.2f} × full fine-tuning's; latency {'; '.join(latencies)}"


def report(folder: Path) -> None:
    """Print the table, and write it and the figure into the folder."""
    results = read_results(folder)
    if not results.runs:
        raise OptionError(f"{folder}: contains no runs", fix="first train: the same command without --report")
    text = table(results)
    with atomic_file(folder / "table.md") as stream:
        stream.write(text.encode())
    save_figure(figure(results), folder / "figure.png", overwrite=True)
    print(f"{text}\nwrote {folder / 'table.md'} and {folder / 'figure.png'}")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--measure", action="store_true", help="step time, memory, latency")
    doing.add_argument("--report", action="store_true", help="table and figure of the results so far")
    doing.add_argument("--tune", action="store_true", help="try all learning rates of the grids on validation texts")
    doing.add_argument("--quick", action="store_true", help="everything, small, into out/alternatives-quick")
    parser.add_argument("--out", type=Path, help=f"the folder of the results [{FULL['out']}]")
    parser.add_argument("--methods", nargs="+", default=NAMES, choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--corpora", nargs="+", choices=tuple(CORPORA), metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N")
    for name in ("steps", "batch", "length"):
        parser.add_argument(f"--{name}", type=_count, metavar="N", help=f"[{FULL[name]}]")
    parser.add_argument("--limit", type=_count, metavar="N", help="judge on at most N texts")
    parser.add_argument("--threads", type=_count, default=1, metavar="N")
    parser.add_argument("--jobs", type=_count, default=1, metavar="N", help="number of runs in parallel")
    given = parser.parse_args(arguments)
    for name, value in (QUICK if given.quick else FULL).items():
        if getattr(given, name, None) is None:
            setattr(given, name, value)
    return given


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


def main(arguments: Sequence[str] | None = None) -> None:
    given = parsed(arguments)
    try:
        if given.tune:
            tune(given.out, given)
        elif given.report:
            report(given.out)
        elif given.measure:
            measure_all(given.out, given)
        else:
            make(jobs_of(given.out, given), at_once=given.jobs)
        if given.quick:
            measure_all(given.out, given)
            report(given.out)
    except LoraLensError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
