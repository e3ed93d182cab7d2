"""Which method combines adapters best? Four adapters for four text tasks become one adapter of the same rank.

    python examples/combining_study.py            after training (kept in out/paper), half an hour on two cores
    python examples/combining_study.py --quick    two tasks, four methods, few texts

Four adapters, one for each task (r = 8, each from its own random A), are combined into one adapter of rank 8. It serves
all four tasks, each with its own classifier. The strength of the result matters as much as the method. Therefore every
result is scaled to ρ times the mean norm of the adapters, and ρ is chosen for each method on validation texts. If the
best ρ lies at the end of the grid, the grid grows until the best lies inside. The accuracy is measured on texts that
are neither in the training nor in the validation set. There are three sets of adapters, from different seeds.

Writes reports/combining_study.md.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from runs import TASKS, Run, asked, judge, make, quiet

os.environ.update(quiet())  # before torch is imported

import loralens
from loralens.arithmetic.methods import METHODS
from loralens.core.adapter import Adapter

STRENGTHS = (0.7, 1.0, 1.4, 2.0)  # the values of ρ that are tried for every method
WIDER = (0.125, 0.18, 0.25, 0.35, 0.5, *STRENGTHS, 2.8, 4.0, 5.6, 8.0, 11.0, 16.0)  # the largest grid
LEFT_OUT = {
    "average": "the same as sum at one norm",
    "knots": "the same as sum",
    "slerp": "takes two adapters",
}
SETS = (0, 1, 2)
SETTING = (__doc__ or "").split("\n\n")[2]  # the third paragraph above is also the introduction of the report


@dataclass(frozen=True)
class Plan:
    """The tasks, methods and sets of adapters, the recipe of their training, and the numbers of texts for judging."""

    tasks: Sequence[str] = TASKS
    methods: Sequence[str] = tuple(name for name in METHODS if name not in LEFT_OUT)
    sets: Sequence[int] = SETS
    validation: int = 48
    held_out: int = 160
    judged: int = 640  # texts that a run is evaluated on after its training
    rank: int = 8
    steps: int = 120
    batch: int = 32

    def runs(self, number: int) -> list[Run]:
        """The adapters of a set. All have different seeds, so that no two start from the same random A."""
        seeds = [(number + i) % 3 + 3 * (i // 3) for i in range(len(self.tasks))]
        recipe = {"rank": self.rank, "steps": self.steps, "batch": self.batch, "held_out": self.judged}
        return [Run(task, seed=seed, **recipe) for task, seed in zip(self.tasks, seeds, strict=True)]


QUICK = Plan(
    TASKS[:2], ("sum", "tsv-m", "iso-c", "ties"), sets=(0,), validation=64, held_out=128, judged=128, steps=60, batch=16
)


@dataclass(frozen=True)
class Set:
    """The adapters of a set, one per task."""

    tasks: Sequence[str]
    adapters: Sequence[Adapter]

    @property
    def norm(self) -> float:
        """Mean ‖ΔW‖ of the adapters."""
        return fmean(norm(adapter) for adapter in self.adapters)

    def combined(self, method: str, rank: int) -> Adapter:
        """All adapters combined into one of this rank, scaled to norm 1, without classifiers."""
        combined = loralens.combine(self.adapters, method=method, take="none").adapter
        cut = loralens.compress(combined, rank=rank).adapter
        return cut * (1 / norm(cut))

    def headed(self, adapter: Adapter, task: str) -> Adapter:
        """An adapter with the classifier of a task."""
        own = self.adapters[list(self.tasks).index(task)]
        return replace(adapter, extra={key: one for key, one in own.extra.items() if one.role == "saved"})


def norm(adapter: Adapter) -> float:
    """‖ΔW‖ of a whole adapter."""
    return sqrt(sum(one.frobenius**2 for one in loralens.spectrum(adapter).only.values()))


def judged(plan: Plan, one: Set, adapter: Adapter, part: str, limit: int) -> dict[str, float]:
    """Accuracy on every task."""
    return {task: judge(task, limit, part).accuracy(one.headed(adapter, task)) for task in plan.tasks}


def examine(plan: Plan, folders: Mapping[int, Sequence[Path]], method: str, kept: Path) -> dict[str, Any]:
    """One method: ρ chosen on the validation texts of the first set, then accuracy on every set; kept as JSON."""
    file = kept / f"{method}.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    sets = {number: Set(plan.tasks, [loralens.load(path) for path in paths]) for number, paths in folders.items()}
    first = sets[plan.sets[0]]
    whole = first.combined(method, plan.rank)
    tried = search(
        lambda strength: fmean(
            judged(plan, first, whole * (strength * first.norm), "validation", plan.validation).values()
        )
    )
    best = max(tried, key=lambda strength: tried[strength])
    accuracy = {
        str(number): judged(plan, one, one.combined(method, plan.rank) * (best * one.norm), "held_out", plan.held_out)
        for number, one in sets.items()
    }
    found = {"method": method, "strength": best, "validation": tried, "accuracy": accuracy}
    file.write_text(json.dumps(found))
    return found


def search(accuracy: Callable[[float], float]) -> dict[float, float]:
    """ρ → accuracy over a grid that grows, within `WIDER`, until the best ρ (in a tie, the first tried) is inside."""
    low, high = WIDER.index(STRENGTHS[0]), WIDER.index(STRENGTHS[-1])
    tried = {strength: accuracy(strength) for strength in STRENGTHS}
    while True:
        best = max(tried, key=lambda strength: tried[strength])
        if best == WIDER[high] and high + 1 < len(WIDER):
            high += 1
            tried[WIDER[high]] = accuracy(WIDER[high])
        elif best == WIDER[low] and low > 0:
            low -= 1
            tried[WIDER[low]] = accuracy(WIDER[low])
        else:
            return dict(sorted(tried.items()))


def alone(plan: Plan, folders: Mapping[int, Sequence[Path]], kept: Path) -> dict[str, Any]:
    """The accuracy of every adapter on its own task, and the accuracy of its classifier without the adapter."""
    file = kept / "alone.json"
    if file.exists():
        return dict(json.loads(file.read_text()))
    found: dict[str, Any] = {"alone": {}, "without": {}}
    for number, paths in folders.items():
        one = Set(plan.tasks, [loralens.load(path) for path in paths])
        found["alone"][str(number)] = {
            task: judge(task, plan.held_out).accuracy(adapter)
            for task, adapter in zip(plan.tasks, one.adapters, strict=True)
        }
        nothing = one.adapters[0] * 0.0
        found["without"][str(number)] = judged(plan, one, nothing, "held_out", plan.held_out)
    file.write_text(json.dumps(found))
    return found


def report(plan: Plan, found: Sequence[Mapping[str, Any]], ends: Mapping[str, Any], command: str) -> str:
    """The table, best method first: the share of the adapters' own accuracy that each method keeps."""
    alone_mean = {task: fmean(one[task] for one in ends["alone"].values()) for task in plan.tasks}

    def share(accuracy: Mapping[str, float], number: str) -> float:
        return fmean(accuracy[task] / ends["alone"][number][task] for task in plan.tasks)

    lines = []
    for one in found:
        shares = [share(accuracy, number) for number, accuracy in one["accuracy"].items()]
        tasks = [fmean(a[task] for a in one["accuracy"].values()) for task in plan.tasks]
        spread = stdev(shares) if len(shares) > 1 else 0.0
        lines.append((fmean(shares), spread, one["method"], one["strength"], tasks))
    lines.sort(reverse=True)
    head = ["method", "kept", "±", "ρ", *plan.tasks]
    rows = [
        [name, f"{kept:.3f}", f"{spread:.3f}", f"{strength:g}", *(f"{value:.3f}" for value in tasks)]
        for kept, spread, name, strength, tasks in lines
    ]
    without = [fmean(one[task] for one in ends["without"].values()) for task in plan.tasks]
    nothing = fmean(share(accuracy, number) for number, accuracy in ends["without"].items())
    rows.append(["*each alone*", "1", "", "", *(f"{alone_mean[task]:.3f}" for task in plan.tasks)])
    rows.append(["*no adapter*", f"{nothing:.3f}", "", "", *(f"{value:.3f}" for value in without)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
    title = "# Combining four adapters into one of the same rank"
    judged = f"ρ is chosen on {plan.validation} texts of each task, and the accuracy is measured on {plan.held_out}."
    return f"    {command}\n\n{title}\n\n{SETTING} {judged}\n\n{table}\n"


def main() -> None:
    """Train what is missing, combine, judge, and write the report."""
    given = asked("combining_study", __doc__)
    plan, runs, reports = QUICK if given.quick else Plan(), given.runs, given.reports
    made = make([run for number in plan.sets for run in plan.runs(number)], runs, jobs=given.jobs)
    folders = {number: [made[run].output for run in plan.runs(number)] for number in plan.sets}
    kept = runs / "combining"
    kept.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(given.jobs) as pool:
        ends = pool.submit(alone, plan, folders, kept)
        jobs = [pool.submit(examine, plan, folders, method, kept) for method in plan.methods]
        found = [job.result() for job in jobs]
    reports.mkdir(parents=True, exist_ok=True)
    from combining_figure import draw  # only here, because it imports matplotlib

    text = report(plan, found, ends.result(), given.command)
    if not given.quick:
        text += "\n![What every method keeps](combining_study.png)\n\n"
        text += Path(__file__).with_name("combining_reading.md").read_text()
    (reports / "combining_study.md").write_text(text)
    draw(plan, found, ends.result(), reports / "combining_study.png")
    print((reports / "combining_study.md").read_text())


if __name__ == "__main__":
    main()
