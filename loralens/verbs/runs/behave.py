"""The verb ``behave``: measures how adapters change the outputs of a model on real inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loralens.analysis.behaviour import BASE, Behaviour, Contrast, measure_behaviour
from loralens.core.adapter import Adapter
from loralens.core.messages import progress, warn
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.tables.numbers import fixed, number, percent
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Table, rows_key
from loralens.verbs.models.loaded import Head
from loralens.verbs.models.models import Running, load_model, model_label, restore_settings
from loralens.verbs.models.texts import read_texts, text_label
from loralens.verbs.models.tokens import Cut, count_cut
from loralens.verbs.shared.adapters import AdapterSource, Source, labels, read_adapter, sources
from loralens.verbs.shared.options import Reading

NAMED = 3  # tensors that warnings name; an adapter of another base may have hundreds of the same kind
# What the logits of a model are counted by: a classifier has one row of logits for a text.
POSITIONS = {"causal": "tokens", "masked": "tokens", "classifier": "texts", "": "tokens"}


@dataclass(frozen=True, slots=True, repr=False)
class BehaviourResult(Tabular):
    """How adapters change the outputs of a model.

    Attributes
    ----------
    texts : int
        The number of texts.
    head : str
        The kind of the logits of the model: ``causal``, ``masked`` or ``classifier``; empty if it has none.
    adapters : mapping of str to str
        The path of each adapter, or the label of an object, by its name.
    behaviour : Behaviour
        The measurements.
    cut : Cut
        What was cut off the texts.
    """

    model: str
    data: str
    texts: int
    head: Head
    adapters: Mapping[str, str]
    behaviour: Behaviour
    cut: Cut

    @property
    def contrasts(self) -> Sequence[Contrast]:
        """The differences between the base and every adapter, then those between adapters."""
        return self.behaviour.contrasts

    def conclusion(self) -> list[str]:
        """How strongly the adapters change the outputs; of several, which one does most and which one least."""
        from_base = [contrast for contrast in self.contrasts if contrast.first == BASE]
        # A model without a head has hidden states alone.
        headed = all(contrast.kl is not None and contrast.agreement is not None for contrast in from_base)
        rows = sorted(from_base, key=lambda row: -(row.kl or 0) if headed else -row.hidden[-1])
        most, least = rows[0], rows[-1]
        what = "changes the outputs" if headed else "moves the last hidden states"
        if most is least:
            if not headed:
                return [f"{most.second} {what} by {percent(most.hidden[-1])}."]
            agreement = f"in {percent(most.agreement)} of the {POSITIONS[self.head]} (KL {number(most.kl)} nats)"
            return [f"{most.second} keeps the first choice of the model {agreement}."]
        by_most, by_least = (
            f"KL {number(row.kl)} nats, another first choice in {percent(1 - (row.agreement or 0.0))}"
            if headed
            else percent(row.hidden[-1])
            for row in (most, least)
        )
        of = f" of the {POSITIONS[self.head]}" if headed else ""
        if by_most == by_least:
            return [f"Each of the {len(rows)} adapters {what} as much as the others ({by_most}{of})."]
        return [
            f"Of {len(rows)} adapters {most.second} {what} most ({by_most}{of}) and {least.second} least ({by_least})."
        ]

    def tables(self) -> list[Table[Any]]:
        """The differences between versions of the model; and those from the base, layer by layer."""
        from_base = [contrast for contrast in self.contrasts if contrast.first == BASE]
        layers = list(enumerate(zip(*(contrast.hidden for contrast in from_base), strict=True)))
        return [
            *self.listing(),
            Table(
                "hidden states, ‖h − h_base‖ / ‖h_base‖ by layer, 0: the embeddings", _layer_columns(from_base), layers
            ),
        ]

    def listing(self) -> list[Table[Contrast]]:
        """The differences between versions of the model."""
        # A model without a head has hidden states and no logits: the titles of their columns are empty, so that tables
        # leave them out while --json and --csv keep them.
        positions = self.behaviour.positions or self.behaviour.states
        title = f"{self.model} on {self.texts} texts of {self.data}: {positions:,} {POSITIONS[self.head]}"
        columns = COLUMNS if self.behaviour.positions else [replace(c, title="") if c in LOGITS else c for c in COLUMNS]
        return [Table(title, columns, self.contrasts)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "model",
            Column("head", lambda result: result.head or None, type=str | None),
            Column(("data", "file"), "data"),
            Column(("data", "texts"), "texts"),
            Column(("data", "cut"), "cut"),
            Column(("data", "positions"), lambda result: result.behaviour.positions or None, type=int | None),
            Column(("data", "states"), "behaviour.states"),
            Column("adapters", _adapter_records, type=(ADAPTER,)),
            rows_key("contrasts", COLUMNS),
        )


# On a narrow terminal columns of low priority are left out first. KL, which alone compares whole distributions, stays.
LOGITS: tuple[Column[Contrast], ...] = (
    Column("kl", "kl", "KL (nats)", number, priority=ALWAYS),
    Column("logits", "logits", "logits rms", number, priority=3),
    Column("agreement", "agreement", "same top", fixed(".2%"), priority=4),
)
COLUMNS: tuple[Column[Contrast], ...] = (
    Column("first", "first", "from", align="left", priority=ALWAYS),
    Column("second", "second", "to", align="left", priority=ALWAYS),
    *LOGITS,
    Column(
        "hidden_last",
        lambda row: row.hidden[-1] if row.hidden else None,
        "hidden, last",
        number,
        priority=5,
        json=False,
    ),
    # A column without a title is not shown in tables: --json has the whole list, and tables have its last layer.
    Column("hidden"),
)


ADAPTER = {
    "name": str,
    "path": str,
    "not_applied": dict[str, str],
    "never_called": list[str],
    "rounded": list[str],
}


def _adapter_records(result: BehaviourResult) -> list[dict[str, Any]]:
    behaviour = result.behaviour
    return [
        {
            "name": name,
            "path": path,
            "not_applied": dict(behaviour.left_out[name]),
            "never_called": list(behaviour.idle[name]),
            "rounded": list(behaviour.changed[name]),
        }
        for name, path in result.adapters.items()
    ]


def _layer_columns(from_base: Sequence[Contrast]) -> list[Column[Any]]:
    """A column for the number of the layer, and one for each adapter."""

    # A function, since a lambda in a loop would see the last value of the loop variables.
    def column(place: int, contrast: Contrast) -> Column[Any]:
        return Column(contrast.second, lambda row: row[1][place], contrast.second, number)

    layer: Column[Any] = Column("layer", "0", "layer", priority=ALWAYS)
    return [layer, *(column(place, contrast) for place, contrast in enumerate(from_base))]


@takes_options
def behave(
    *adapters: Source,
    running: Running,
    reading: Reading,
) -> BehaviourResult:
    """Show what each adapter does to the outputs of its base on real inputs, and how far adapters are apart.

    Differences of hidden states are always measured; KL divergence and differences of logits where the model has a
    head. Updates are added in float32, and nothing is merged.

    `--adapters A B` means the same as A B.

    Parameters
    ----------
    *adapters : path, Adapter or model
    running : Running
        The options ``model``, ``data``, ``limit``, ``batch``, ``length``, ``device``, ``dtype``, ``threads``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        There is no adapter, or one is given twice; the device or the dtype does not exist; a file does not exist; torch
        is not installed.
    FormatError
        An adapter, a model or texts cannot be read.
    MismatchError
        An adapter does not fit the model.

    Examples
    --------
    $ loralens behave adapter --model model --data texts.txt
    """
    running.check()
    model, data = running.model, running.data
    texts = read_texts(data, limit=running.limit)
    paths = _name_adapters(sources(adapters))
    # A model that is an object has no files with which an adapter could be compared.
    base = None if isinstance(model, tuple) else model
    read = {
        name: read_adapter(source, reading, base=base, applies_all=True, label=name)
        for name, (_, source) in paths.items()
    }
    with restore_settings(model):
        loaded = load_model(model, device=running.device, dtype=running.dtype, threads=running.threads)
        cut = count_cut(loaded, [text.text for text in texts], length=running.length)
        cut.warn(text_label(data))
        config: Any = loaded.model.config
        # `restore_settings` restores it.
        config.output_hidden_states = True
        with place(model_label(model)), progress("running the model", len(texts)) as step:
            batches = loaded.batches(texts, batch=running.batch, length=running.length, step=step)
            behaviour = measure_behaviour(loaded.model, batches, adapters=read)
    _warn_of_exceptions(behaviour)
    return BehaviourResult(
        model_label(model),
        text_label(data),
        len(texts),
        loaded.head,
        {name: label for name, (label, _) in paths.items()},
        behaviour,
        cut,
    )


def _name_adapters(adapters: Sequence[AdapterSource]) -> dict[str, tuple[str, AdapterSource]]:
    """The label and the source of each adapter by its name.

    The name is the last part of its path, or the whole path if two would have the same name.
    """
    names = labels(adapters)
    if len(set(names)) < len(names):
        raise OptionError("an adapter is given twice", fix="give each adapter once")
    # A path such as ".." has no last part, and `BASE` is the name of the model without an adapter.
    ends = [
        label if isinstance(source, Adapter) else Path(label).name
        for label, source in zip(names, adapters, strict=True)
    ]
    return {
        end if end and end != BASE and ends.count(end) == 1 else label: (label, source)
        for end, label, source in zip(ends, names, adapters, strict=True)
    }


def _warn_of_exceptions(behaviour: Behaviour) -> None:
    """Warn of tensors that were not applied, or not as they are."""
    left_out = {
        name: [f"{key} ({reason})" for key, reason in tensors.items()] for name, tensors in behaviour.left_out.items()
    }
    for what, tensors_of in (
        ("is not applied", left_out),
        ("was never called by the model", behaviour.idle),
        ("has no layer of its own: its weight was changed, and so rounded", behaviour.changed),
    ):
        for adapter, tensors in tensors_of.items():
            for tensor in list(tensors)[:NAMED]:
                warn(f"{adapter}: {tensor} {what}")
            if len(tensors) > NAMED:
                warn(f"{adapter}: and {len(tensors) - NAMED} more")
