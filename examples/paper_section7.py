"""Section 7 of the LoRA paper (Hu et al. 2021), repeated on a small encoder and three text tasks.

    python examples/paper_section7.py                 all runs, kept in out/paper: 68 minutes
    python examples/paper_section7.py --quick         two ranks, two seeds, two tasks, 60 short steps: 6 minutes

(Measured on 2026-11-25 on two cores of an AMD EPYC without AVX-512, which also did other work for part of the time. A
step of 32 × 64 tokens takes 1.1 s there; all times are about proportional to it. The alternatives of `make paper` took
27 minutes more.)

Writes reports/paper_section7.md with its pictures and numbers, and the same as one page of HTML. Every run is kept, so
a second call only measures.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from runs import LENGTH, MODEL, TASKS, Run, accuracy_of, asked, judge, make, quiet

os.environ.update(quiet())  # before torch is imported

import loralens
from loralens.analysis import compare_subspaces
from loralens.core.adapter import Adapter
from loralens.verbs.runs.grid import GridRun

KINDS = ("query", "value")
COLUMNS = ("delta_norm", "projected_norm", "random_norm", "top_norm", "amplification", "excess", "z")


@dataclass(frozen=True)
class Plan:
    """The runs to train: one for every task, rank and seed, all by the same recipe."""

    tasks: Sequence[str] = TASKS[:3]
    ranks: Sequence[int] = (1, 2, 4, 8, 64)
    seeds: Sequence[int] = (0, 1)
    steps: int = 120
    batch: int = 32
    held_out: int = 640  # texts for the accuracy

    def run(self, task: str, rank: int, seed: int) -> Run:
        """The run of a task, a rank and a seed."""
        return Run(task, rank, seed, steps=self.steps, batch=self.batch, held_out=self.held_out)

    @property
    def runs(self) -> list[Run]:
        """All runs, one seed after the other."""
        return [self.run(task, rank, seed) for seed in self.seeds for task in self.tasks for rank in self.ranks]


QUICK = Plan(tasks=TASKS[:2], ranks=(8, 64), steps=60, batch=16, held_out=256)


@dataclass
class Study:
    """The adapters of a plan, and the results of measuring them."""

    plan: Plan
    runs: dict[Run, GridRun]
    found: dict[str, Any] = field(default_factory=dict)

    def adapter(self, task: str, rank: int, seed: int = 0) -> Adapter:
        """The adapter of a task, a rank and a seed."""
        return self.runs[self.plan.run(task, rank, seed)].adapter

    @property
    def small(self) -> int:
        """The rank that is compared with the largest: 8."""
        return 8

    @property
    def large(self) -> int:
        """The largest rank: 64."""
        return max(self.plan.ranks)

    def measure(self) -> None:
        """Measure everything that the report shows; ``found`` then holds it as plain numbers."""
        self.found["plan"] = {name: getattr(self.plan, name) for name in self.plan.__dataclass_fields__}
        self.found["accuracy"] = self._accuracies()
        for name, one in (("ranks", self._ranks), ("seeds", self._seeds), ("tasks", self._tasks)):
            self.found[name] = one()
        self.found["amplification"] = self._amplification()
        self.found["truncated"] = self._truncated()

    def _accuracies(self) -> dict[str, Any]:
        """Table 6: by task and rank, the accuracies of all seeds."""
        plan = self.plan
        return {
            task: {
                str(rank): [accuracy_of(self.runs[plan.run(task, rank, seed)]) for seed in plan.seeds]
                for rank in plan.ranks
            }
            for task in plan.tasks
        }

    def _ranks(self) -> dict[str, Any]:
        """Figure 3: r = 8 against r = 64, with the same task and order of texts, but independent initial A."""
        return {
            task: shared(self.adapter(task, self.small), self.adapter(task, self.large)) for task in self.plan.tasks
        }

    def _seeds(self) -> dict[str, Any]:
        """Figure 4: two seeds at the largest rank, and at r = 8."""
        first, second = self.plan.seeds[:2]
        return {
            f"{task} r={rank}": shared(self.adapter(task, rank, first), self.adapter(task, rank, second))
            for task in self.plan.tasks
            for rank in (self.small, self.large)
        }

    def _tasks(self) -> dict[str, Any]:
        """Not in the paper: two tasks at r = 8 with the same seed, so that both start from the same A."""
        tasks = self.plan.tasks
        pairs = [(one, other) for i, one in enumerate(tasks) for other in tasks[i + 1 :]]
        return {
            f"{one} and {other}": shared(self.adapter(one, self.small), self.adapter(other, self.small))
            for one, other in pairs
        }

    def _amplification(self) -> dict[str, Any]:
        """Table 7: ‖ΔW‖, ‖UᵀWV‖, their ratio and the random control for every task, rank and kind of module."""
        found: dict[str, Any] = {}
        for task in self.plan.tasks:
            for rank in self.plan.ranks:
                for kind, medians in amplified(self.adapter(task, rank), MODEL, KINDS).items():
                    found[f"{task} r={rank} {kind}"] = medians
        return found

    def _truncated(self) -> dict[str, Any]:
        """The accuracies and errors of the adapter of the largest rank, cut to k directions."""
        found: dict[str, Any] = {}
        for task in self.plan.tasks:
            judged = judge(task, self.plan.held_out, threads=os.cpu_count() or 1)
            adapter = self.adapter(task, self.large)
            ranks = [k for k in (1, 2, 4, 8, 16, 32) if k < self.large]
            cut = {k: loralens.compress(adapter, rank=k) for k in ranks}
            found[task] = {
                "whole": judged.accuracy(adapter),
                "cut": {str(k): judged.accuracy(one.adapter) for k, one in cut.items()},
                "error": {str(k): one.relative_error for k, one in cut.items()},
            }
        return found


def amplified(adapter: Adapter, base: str, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """Kind of module → `COLUMNS` of ΔW against W, as medians over its modules."""
    rows = loralens.amplify(adapter, base=base)
    found = {}
    for kind in kinds:
        kept = [one.rows[-1] for name, one in rows.items() if name.endswith(kind)]
        found[kind] = {name: median(getattr(row, name) for row in kept) for name in COLUMNS}
    return found


def shared(first: Adapter, second: Adapter, kinds: Sequence[str] = KINDS) -> dict[str, Any]:
    """φ(1, 1), φ(4, 4) and φ of all directions, on both sides of ΔW and for A: medians over the modules of a kind."""
    found: dict[str, Any] = {}
    for label, of, side in (("in", "update", "in"), ("out", "update", "out"), ("A", "A", "in")):
        comparison = compare_subspaces(first, second, of=of, side=side)  # type: ignore[arg-type]
        for kind in kinds:
            overlaps = [one.overlap for name, one in comparison.items() if name.endswith(kind)]
            k1, k2 = overlaps[0].phi.shape
            found[f"{kind} {label}"] = {
                "phi_1_1": median(one.first for one in overlaps),
                "phi_4_4": median(float(one.phi[min(4, k1) - 1, min(4, k2) - 1]) for one in overlaps),
                "phi_all": median(one.full for one in overlaps),
                "chance_1_1": 1 / overlaps[0].n,
                "chance_4_4": 4 / overlaps[0].n,
                "chance_all": max(k1, k2) / overlaps[0].n,
            }
    found["cosine"], found["cosine_z"] = comparison.cosine, comparison.cosine_z  # always of ΔW, for any ``of``
    return found


def main() -> None:
    given = asked("paper_section7", __doc__)
    plan, folder, reports = QUICK if given.quick else Plan(), given.runs, given.reports
    print(f"{len(plan.runs)} runs of {plan.steps} steps of {plan.batch} texts of {LENGTH} tokens")
    study = Study(plan, make(plan.runs, folder, jobs=given.jobs))
    study.measure()
    reports.mkdir(parents=True, exist_ok=True)
    (reports / "paper_section7.json").write_text(json.dumps(study.found, indent=1) + "\n")
    from paper_report import alternatives, write  # only here, because it imports matplotlib

    reading = None if given.quick else Path(__file__).with_name("paper_reading.md")
    write(study, reports, command=given.command, reading=reading, more=alternatives(folder / "alternatives", reports))
    print(f"wrote {reports / 'paper_section7.md'}")
    mean = {task: fmean(ranks[str(plan.ranks[-1])]) for task, ranks in study.found["accuracy"].items()}
    print("accuracy at the largest rank: " + ", ".join(f"{task} {value:.3f}" for task, value in mean.items()))


if __name__ == "__main__":
    main()
