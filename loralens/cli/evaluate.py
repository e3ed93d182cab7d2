"""``loralens evaluate``: how well a model does its task on held-out texts, with each of several adapters."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.progress import progress
from loralens.cli.record import known
from loralens.cli.terminal import say
from loralens.cli.train import TASKS
from loralens.errors import OptionError

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.cli.cut import Cut
    from loralens.cli.models import Loaded
    from loralens.cli.train_inputs import Texts
    from loralens.core.adapter import Adapter
    from loralens.training.tasks import Task

COUNT = click.IntRange(min=1)
LENGTH = 256  # tokens of a text, where nothing else is said


@click.command("evaluate")
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@click.option("--model", required=True, metavar="DIR", help="The base: a transformers folder, a Hub id, or a package.")
@click.option("--task", type=click.Choice(TASKS), required=True, help="What is asked of it.")
@click.option("--data", required=True, metavar="FILE", help="Texts as train takes them; of a corpus what it holds out.")
@click.option("--limit", type=COUNT, metavar="N", help="Only the first N texts.")
@click.option("--batch", type=COUNT, default=64, show_default=True, metavar="N", help="Texts at a time.")
@click.option("--length", type=COUNT, metavar="N", help="Tokens of a text.  [default: as it was trained, else 256]")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, mps …")
@click.option(
    "--dtype", type=click.Choice(list(options.DTYPES)), default="f32", show_default=True, help="Of the model."
)
@click.option("--threads", type=COUNT, metavar="N", help="Of the CPU.  [default: all that it may use]")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable result.")
@options.reading
def command(adapters: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure loss, accuracy and, of language, perplexity: of the model with each adapter, or of the model as it is.

    A classifier's labels are those that the adapter was trained on, where it says so, else the model's own, where it
    knows those of the texts, else those of the texts, sorted.
    """
    from loralens.cli.train_inputs import data_of
    from loralens.training.tasks import task_named

    task = task_named(given["task"])
    learned, held_out = data_of(given["data"], None, labelled=task.labelled, one_label=True)
    texts = (held_out or learned).head(given["limit"])
    reading = {name: given[name] for name in options.READING}
    loaded = [options.read_adapter(path, reading, base=given["model"], whole=True) for path in adapters]
    versions: list[Adapter | None] = [*loaded] or [None]
    models: dict[tuple[str, ...] | None, Loaded] = {}  # by their labels: one serves all adapters that have the same
    with progress("evaluating", len(versions) * len(texts.texts)) as step:
        found = [_measured(given, task, texts, adapter, models, step) for adapter in versions]
    cuts = list(dict.fromkeys(cut for _, cut in found))  # one for each length, which may be the adapter's own
    for cut in cuts:
        cut.warn(texts.name)
    rows = [(path, measures) for path, (measures, _) in zip(adapters or (None,), found, strict=True)]
    if as_json:
        record = {"model": given["model"], "task": task.name, "data": texts.name, "texts": len(texts.texts)}
        each = [{"path": path, **{name: known(value) for name, value in row.items()}} for path, row in rows]
        click.echo(json.dumps(record | {"cut": [cut.record() for cut in cuts], "adapters": each}))
        return
    _show(rows, f"{given['model']}, {len(texts.texts)} texts of {texts.name}")


def _measured(
    given: dict[str, Any],
    task: "Task",
    texts: "Texts",
    adapter: "Adapter | None",
    models: "dict[tuple[str, ...] | None, Loaded]",
    step: "Callable[[int], None] | None",
) -> "tuple[dict[str, float], Cut]":
    """The measures of one version of the model, and what was left out of the texts."""
    import torch

    from loralens.cli.causality import CAUSAL, check_causal
    from loralens.cli.cut import count_cut
    from loralens.cli.models import load_headed
    from loralens.core.attached import Attachment
    from loralens.core.training import record_of
    from loralens.errors import place

    record = (record_of(adapter) if adapter else None) or {}
    labels = _labels(record.get("labels") or (), given, texts) if task.labelled else None
    if labels not in models:
        names = ("device", "dtype", "threads")
        models[labels] = load_headed(given["model"], task.head, labels=labels, **{name: given[name] for name in names})
    model = models[labels]
    length = given["length"] or record.get("length") or LENGTH
    with place(given["data"]):
        numbers = None if labels is None else texts.numbered(labels)
        examples = model.encoded(texts.texts, length=length, labels=numbers)
        cut = count_cut(model, texts.texts, length=length)
    with place(given["model"]):
        if task.head == CAUSAL:
            check_causal(model, examples)
        attachment = Attachment(model.model, adapter) if adapter else None
    for key, why in attachment.left_out.items() if attachment else ():
        say(f"warning: {given['model']}: {key} is not applied ({why})", err=True)
    random = model.random(attachment.replaced if attachment else ())
    if random:
        _warn(given["model"], sorted(random), adapted=adapter is not None)
    evaluation = task.evaluation(examples, size=given["batch"], step=step)
    with torch.no_grad(), attachment.on() if attachment else nullcontext():
        return dict(evaluation(model.model)), cut


def _labels(trained: Sequence[str], given: dict[str, Any], texts: "Texts") -> tuple[str, ...]:
    """The labels in the order of the head: the adapter's, or the classifier's own, or those of the texts, sorted."""
    from loralens.cli.models import labels_of

    own = labels_of(given["model"])
    labels = tuple(trained) or (own if set(texts.labels) <= set(own) else texts.labels)
    if len(labels) < 2:
        raise OptionError(
            f"{given['data']}: all texts have the label {labels[0]!r}, and nothing says what others there are",
            fix="give texts of at least two labels, or an adapter that was trained on them",
        )
    return labels


def _warn(model: str, random: Sequence[str], *, adapted: bool) -> None:
    """Say which weights nobody brought."""
    from loralens.core.names import some

    neither = "neither the model nor the adapter has" if adapted else "the model does not have"
    say(f"warning: {model}: {neither} {some(random, 1)}: random here", err=True)
    click.echo("  fix: trust no number that depends on them; give an adapter with its head", err=True)


def _show(rows: Sequence[tuple[str | None, Mapping[str, float]]], title: str) -> None:
    """A line an adapter: its path, None for the model as it is, and its measures."""
    from loralens.cli.table import Column, Table, number, show

    columns = [Column("adapter", "left"), *map(Column, rows[0][1])]
    show(Table(title, columns, [[path or "(the model as it is)", *map(number, row.values())] for path, row in rows]))
