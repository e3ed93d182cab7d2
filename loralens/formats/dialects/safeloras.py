"""Files of cloneofsimo's safeloras, with keys such as ``unet:12:up`` and ``unet:12:down``.

Modules have numbers, which count the layers inside the classes that the header names. Here they are called ``unet.12``,
because only the model tells the names of its layers. The scale is 1. Tensors marked ``<embed>`` in the header are
embeddings of new tokens (``<s1>``).
"""

import re
from collections.abc import Iterable

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lowrank import Scaling
from loralens.formats.dialects.pairs import Leaf, group, make_adapter, read_pair, unfold
from loralens.formats.files.container import Stored

NAME = "safeloras"

# unet:12:up, text_encoder:0:down
_HALF = re.compile(r"^(?P<model>\w+):(?P<number>[0-9]{1,9}):(?P<half>up|down)$")
_EMBEDDING = "<embed>"


def safeloras_leaf(key: str) -> Leaf | None:
    """The module and the half that a key names; None for any other key."""
    half = _HALF.match(key)
    # 012 and 12 are the same layer.
    return Leaf(f"{half['model']}.{int(half['number'])}", "B" if half["half"] == "up" else "A") if half else None


def detect(stored: Stored) -> bool:
    """Whether a file is a safeloras: keys of a model, a number and a half."""
    return any(safeloras_leaf(key) for key in stored.tensors)


def read(stored: Stored) -> Adapter:
    """The adapter of a safeloras file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or two keys have the same number.
    """
    groups, unpaired = group(stored.tensors, safeloras_leaf)
    scaling = Scaling("given", origin="safeloras have scale 1")
    modules = unfold(groups, lambda name, parts: [(name, read_pair(parts, NAME, lambda *_: scaling))])
    # The header has an entry for each learned token, whose key is the token itself.
    header = stored.metadata or {}
    extra = {
        key: Extra("tokens", "text_encoder", tensor) if header.get(key) == _EMBEDDING else Extra("other", "", tensor)
        for key, tensor in unpaired.items()
    }
    return make_adapter(stored, NAME, modules, extra, [_about_names(modules, stored)])


def _about_names(modules: Iterable[str], stored: Stored) -> Finding:
    metadata = stored.metadata or {}
    models = sorted({name.partition(".")[0] for name in modules})
    # The names come from the file, so they are escaped and cut.
    classes = ", ".join(f"{model}: {ascii(metadata.get(model, 'not said'))[1:-1][:80]}" for model in models)
    text = f"modules have numbers, not names: they count the layers inside these classes ({classes})"
    return Finding("note", "names-unknown", text, "merging needs the model's own order of layers")
