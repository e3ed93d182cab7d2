"""Writing a compressed fleet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np

from loralens.core.few_bits.shared_bases import SharedShape
from loralens.core.lazy import LazyArray
from loralens.errors import OptionError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import Stored
from loralens.formats.files.disk import check_room
from loralens.formats.files.json_text import json_text
from loralens.formats.files.leftovers import tidy
from loralens.formats.files.writing import write_safetensors
from loralens.formats.records.fleets.contents import (
    KEY,
    VERSION,
    Kind,
    about_key,
    extra_key,
    fields_digest,
    group_keys,
    numbers_key,
    tensor_digest,
)


@final
@dataclass(frozen=True, slots=True)
class FleetEntry:
    """An adapter to write.

    Attributes
    ----------
    about : mapping
        The JSON object of `loralens.formats.records.fleets.about`.
    numbers : LazyArray, str or None
        Its bytes; for a copy the name of the adapter that has them; None if its tensors are stored as they are.
    group : int or None
    extras : mapping of str to LazyArray
        By `content_digest`: the tensors to which ``about`` refers.
    """

    kind: Kind
    error: float
    pair_bytes: int
    about: Mapping[str, Any]
    numbers: LazyArray | str | None
    group: int | None = None
    extras: Mapping[str, LazyArray] = field(default_factory=dict)


@final
@dataclass(frozen=True, slots=True)
class GroupEntry:
    """The bases of a group to write: the shapes of its modules, and the bytes of out, in and widths."""

    shapes: Sequence[SharedShape]
    parts: tuple[LazyArray, LazyArray, LazyArray]


def check_fleet_target(path: Path, *, overwrite: bool) -> None:
    """Refuse a path where a fleet cannot be written, before any work is done.

    Raises
    ------
    OptionError
        It does not end in ``.safetensors``, is a folder, or exists and ``overwrite`` is false.
    """
    with place(path):
        if path.suffix != ".safetensors":
            raise OptionError("a fleet is written to a .safetensors file", fix="give a name with that ending")
        check_room(path)
        tidy(path)
        if path.is_dir():
            raise OptionError("is a folder", fix="choose another target")
        if path.exists() and not overwrite:
            raise OptionError("exists", fix="choose another target, or give --overwrite")


def write_fleet(
    path: Path,
    adapters: Mapping[str, FleetEntry],
    groups: Sequence[GroupEntry],
    *,
    error: float,
    check: Callable[[Path], None],
) -> None:
    """Write a fleet in place of what is at the path; it appears complete or not at all.

    ``check`` gets the path of the written file before it takes its place; if it raises an error, nothing is replaced.
    """
    write_safetensors(_assemble(adapters, groups, error), path, put=partial(atomic_file, check=check))


def _assemble(adapters: Mapping[str, FleetEntry], groups: Sequence[GroupEntry], error: float) -> Stored:
    """The tensors and the table of contents."""
    places = {name: i for i, name in enumerate(adapters)}
    tensors: dict[str, LazyArray] = {}
    entries: dict[str, Any] = {}
    for name, adapter in adapters.items():
        number, numbers = places[name], adapter.numbers
        tensors[about_key(number)] = json_tensor(adapter.about)
        if isinstance(numbers, LazyArray):
            tensors[numbers_key(number)] = numbers
        tensors |= {extra_key(digest): tensor for digest, tensor in adapter.extras.items()}
        owner = places[numbers] if isinstance(numbers, str) else number if numbers is not None else None
        entries[name] = {
            "kind": adapter.kind,
            "error": adapter.error,
            "numbers": owner,
            "group": adapter.group,
            "bytes": adapter.pair_bytes,
        }
    for number, group in enumerate(groups):
        tensors |= dict(zip(group_keys(number), group.parts, strict=True))
    fields: dict[str, Any] = {
        "version": VERSION,
        "error": error,
        "groups": [[list(shape) for shape in group.shapes] for group in groups],
        "adapters": entries,
        "digests": {key: tensor_digest(tensor) for key, tensor in tensors.items()},
    }
    return Stored(tensors, {KEY: json_text({**fields, "digest": fields_digest(fields)})})


def json_tensor(value: Mapping[str, Any]) -> LazyArray:
    """A JSON object as the bytes of its text."""
    return LazyArray.of(np.frombuffer(json_text(value).encode("utf-8"), np.uint8))
