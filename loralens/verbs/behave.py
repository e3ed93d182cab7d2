"""The verb ``behave``: measures what adapters do to the outputs of a model on real inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from loralens.analysis.behaviour import BASE, Behaviour, Contrast, measure_behaviour
from loralens.core.adapter import Adapter
from loralens.core.messages import warn
from loralens.core.progress import progress
from loralens.errors import OptionError, place
from loralens.tables.numbers import fixed, json_number, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import AdapterSource, Reading, Source, labels, read_adapter, sources
from loralens.verbs.inputs.choices import FloatType, check_counts
from loralens.verbs.inputs.cut import Cut, count_cut
from loralens.verbs.inputs.loaded import Head
from loralens.verbs.inputs.models import ModelSource, load_model, model_label, restore_settings
from loralens.verbs.inputs.texts import TextSource, read_texts, text_label

NAMED = 3  # tensors named in a warning before the others are counted
POSITIONS = {"causal": "tokens", "masked": "tokens", "classifier": "texts", "": "tokens"}


@dataclass(frozen=True, slots=True)
class BehaviourResult(Tabular):
    """What adapters do to the outputs of a model.

    Attributes
    ----------
    texts : int
        How many texts there were.
    head : str
        What the logits of the model are of: ``causal``, ``masked``, ``classifier``; empty where it has none.
    adapters : mapping of str to str
        Name → path, or what an object is called.
    behaviour : Behaviour
        What was measured.
    cut : Cut
        What was left out of the texts.
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
        """The base against every adapter, then the adapters against each other."""
        return self.behaviour.contrasts

    def __repr__(self) -> str:
        return f"BehaviourResult({len(self.adapters)} adapters on {self.texts} texts of {self.data})"

    def tables(self) -> list[Table[Any]]:
        """How far versions of the model are apart; and from the base, layer by layer."""
        from_base = [contrast for contrast in self.contrasts if contrast.first == BASE]
        layers = list(enumerate(zip(*(contrast.hidden for contrast in from_base), strict=True)))
        return [
            *self.listing(),
            Table(
                "hidden states, ‖h − h_base‖ / ‖h_base‖ by layer, 0: the embeddings", _layer_columns(from_base), layers
            ),
        ]

    def listing(self) -> list[Table[Contrast]]:
        """How far versions of the model are apart."""
        positions = self.behaviour.positions or self.behaviour.states
        title = f"{self.model} on {self.texts} texts of {self.data}: {positions:,} {POSITIONS[self.head]}"
        columns = COLUMNS if self.behaviour.positions else [replace(c, title="") if c in LOGITS else c for c in COLUMNS]
        return [Table(title, columns, self.contrasts)]

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object: every layer, and what was not applied."""
        behaviour = self.behaviour
        return {
            "model": self.model,
            "head": self.head or None,
            "data": {
                "file": self.data,
                "texts": self.texts,
                "cut": self.cut.record(),
                "positions": behaviour.positions or None,
                "states": behaviour.states,
            },
            "adapters": [
                {
                    "name": name,
                    "path": path,
                    "not_applied": dict(behaviour.left_out[name]),
                    "never_called": list(behaviour.idle[name]),
                    "rounded": list(behaviour.changed[name]),
                }
                for name, path in self.adapters.items()
            ],
            "contrasts": self.listing()[0].records(),
        }


LOGITS: tuple[Column[Contrast], ...] = (
    Column("kl", lambda row: json_number(row.kl), "KL (nats)", number, priority=ALWAYS),
    Column("logits", lambda row: json_number(row.logits), "logits rms", number, priority=3),
    Column("agreement", lambda row: row.agreement, "same top", fixed(".2%"), priority=4),
)
COLUMNS: tuple[Column[Contrast], ...] = (
    Column("first", lambda row: row.first, "from", align="left", priority=ALWAYS),
    Column("second", lambda row: row.second, "to", align="left", priority=ALWAYS),
    *LOGITS,
    Column(
        "hidden_last",
        lambda row: json_number(row.hidden[-1]) if row.hidden else None,
        "hidden, last",
        number,
        priority=5,
        json=False,
    ),
    Column("hidden", lambda row: [json_number(value) for value in row.hidden]),
)


def _layer_columns(from_base: Sequence[Contrast]) -> list[Column[Any]]:
    """The layer, and a column for each adapter."""

    def column(place: int, contrast: Contrast) -> Column[Any]:
        return Column(contrast.second, lambda row: json_number(row[1][place]), contrast.second, number)

    layer: Column[Any] = Column("layer", lambda row: row[0], "layer", priority=ALWAYS)
    return [layer, *(column(place, contrast) for place, contrast in enumerate(from_base))]


def behave(
    *adapters: Source,
    model: ModelSource,
    data: TextSource,
    limit: int | None = None,
    batch: int = 16,
    length: int = 256,
    device: str = "auto",
    dtype: FloatType = "f32",
    threads: int | None = None,
    **reading: Unpack[Reading],
) -> BehaviourResult:
    """Show what each adapter does to the outputs of its base on real inputs, and how far adapters are apart.

    Differences of hidden states are always measured; KL divergence and differences of logits where the model has a
    head. Updates are added in float32, and nothing is merged.

    Parameters
    ----------
    *adapters : path or Adapter
    model : path or (model, tokenizer)
        The base: a transformers folder, a Hub id in the local cache, or a package; or a model of transformers and its
        tokenizer, which is left as it was.
    data : path or iterable
        Real inputs: ``.jsonl``, ``.txt``, ``.csv`` or ``.tsv``, or a list of texts.
    limit : int, optional
        Use only the first ``limit`` texts.
    batch, length : int
        The number of texts that the model sees at a time, and of tokens after which a text is cut.
    device, dtype : str
        The device and the dtype of a model that is loaded from a folder.
    threads : int, optional
        The number of CPU threads; by default all that the process may use.
    **reading : Reading
        How files are read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        No adapter, or one twice; an unknown device or dtype; no such file; torch is not installed.
    FormatError
        An adapter, a model or texts that cannot be read.
    MismatchError
        An adapter does not fit the model.
    """
    check_counts(limit=limit, batch=batch, length=length, threads=threads)
    texts = read_texts(data, limit=limit)
    paths = _name_adapters(sources(adapters))
    # A model that is an object has no files with which an adapter could be compared.
    base = None if isinstance(model, tuple) else model
    read = {
        name: read_adapter(source, reading, base=base, applies_all=True, label=name)
        for name, (_, source) in paths.items()
    }
    with restore_settings(model):
        loaded = load_model(model, device=device, dtype=dtype, threads=threads)
        cut = count_cut(loaded, [text.text for text in texts], length=length)
        cut.warn(text_label(data))
        config: Any = loaded.model.config
        # restore_settings sets it back.
        config.output_hidden_states = True
        with place(model_label(model)), progress("running the model", len(texts)) as step:
            batches = loaded.batches(texts, batch=batch, length=length, step=step)
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

    That is the last part of its path, or the path where two would be called alike.
    """
    names = labels(adapters)
    if len(set(names)) < len(names):
        raise OptionError("an adapter is named twice", fix="name each one once")
    ends = [
        label if isinstance(source, Adapter) else Path(label).name
        for label, source in zip(names, adapters, strict=True)
    ]
    return {
        end if end and end != BASE and ends.count(end) == 1 else label: (label, source)
        for end, label, source in zip(ends, names, adapters, strict=True)
    }


def _warn_of_exceptions(behaviour: Behaviour) -> None:
    """Say what was not applied, or not as it is."""
    for name, left_out in behaviour.left_out.items():
        _warn_of(name, "is not applied", [f"{key} ({why})" for key, why in left_out.items()])
    for name, idle in behaviour.idle.items():
        _warn_of(name, "was never called by the model", list(idle))
    for name, changed in behaviour.changed.items():
        _warn_of(name, "has no layer of its own: its weight was changed, and so rounded", list(changed))


def _warn_of(adapter: str, what: str, tensors: list[str]) -> None:
    for tensor in tensors[:NAMED]:
        warn(f"{adapter}: {tensor} {what}")
    if len(tensors) > NAMED:
        warn(f"{adapter}: and {len(tensors) - NAMED} more")
