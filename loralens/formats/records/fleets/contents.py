"""The table of contents of a compressed fleet, and its checks.

The JSON object has these fields:

============  ==========================================================================================
version       1
error         the largest error ‖ΔW − ΔW'‖/‖ΔW‖ that was allowed for an adapter
groups        for every group a list with [out, in, p, q] of each module
adapters      name → an object with ``kind``, ``error``, ``numbers``, ``group`` and ``bytes``
digests       tensor → SHA-256 of its bytes
digest        SHA-256 of the other fields, as JSON without blanks and with sorted keys
============  ==========================================================================================

``kind`` is joint, alone, copy or stored. ``numbers`` is the number I of the adapter whose numbers are used (its own
but for copies), or null if its tensors are stored as they were. ``group`` is a number of a group or null. ``bytes`` are
the bytes of the pairs in the file of the source, of which the reader only adds up.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal, final, get_args

from loralens.core.few_bits.shared_bases import SharedShape
from loralens.core.lazy import LazyArray
from loralens.errors import FormatError
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import finite_number, is_safe_text, unique_keys
from loralens.formats.files.relative_name import is_relative_name
from loralens.formats.files.safetensors_header import tensor_pieces

KEY = "loralens_fleet"
VERSION = 1
Kind = Literal["joint", "alone", "copy", "stored"]

DAMAGED = "the file is damaged: copy it again, or make it again with loralens fleet compress"


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter in the table of contents.

    Attributes
    ----------
    number : int
        Its place in the table.
    numbers : int or None
        The place of the adapter whose numbers it uses.
    group : int or None
    error : float
        ‖ΔW − ΔW'‖/‖ΔW‖.
    pair_bytes : int
        The bytes of its pairs in the source.
    """

    number: int
    kind: Kind
    error: float
    numbers: int | None
    group: int | None
    pair_bytes: int


@final
@dataclass(frozen=True, slots=True)
class Contents:
    """The checked table of contents."""

    error: float
    groups: Sequence[tuple[SharedShape, ...]]
    adapters: Mapping[str, Entry]
    digests: Mapping[str, str]


def about_key(number: int) -> str:
    """The tensor with everything about an adapter but its numbers."""
    return f"adapters.{number}.about"


def numbers_key(number: int) -> str:
    """The tensor with the numbers of an adapter."""
    return f"adapters.{number}.numbers"


def group_keys(group: int) -> tuple[str, str, str]:
    """The tensors of a group: out, in and widths."""
    return f"groups.{group}.out", f"groups.{group}.in", f"groups.{group}.widths"


def extra_key(digest: str) -> str:
    """The tensor of an extra."""
    return f"extras.{digest}"


def tensor_digest(tensor: LazyArray) -> str:
    """The SHA-256 of the bytes of a tensor, in hexadecimal."""
    digest = sha256()
    for piece in tensor_pieces(tensor):
        digest.update(piece.tobytes())
    return digest.hexdigest()


def content_digest(tensor: LazyArray) -> str:
    """The name under which equal tensors are stored once: a digest of dtype, shape and bytes."""
    return sha256(f"{tensor.dtype}{tensor.shape}{tensor_digest(tensor)}".encode()).hexdigest()[:32]


def fields_digest(fields: Mapping[str, Any]) -> str:
    """The SHA-256 of the fields of a table of contents without ``digest``."""
    digested = {key: value for key, value in fields.items() if key != "digest"}
    return sha256(json.dumps(digested, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def parse_contents(stored: Stored) -> Contents:
    """The table of contents of a file.

    Raises
    ------
    FormatError
        The file is not a compressed fleet, is of a newer version, or is damaged.
    """
    text = (stored.metadata or {}).get(KEY)
    if text is None:
        raise FormatError("is not a compressed fleet", fix="give a file that loralens fleet compress wrote")
    try:
        fields = json.loads(text, object_pairs_hook=unique_keys)
        if fields["version"] != VERSION:
            what = f"is a fleet of version {fields['version']!a:.20}, and this loralens reads {VERSION}"
            raise FormatError(what, fix="update loralens")
        _require(fields["digest"] == fields_digest(fields))
        groups = tuple(tuple(_shape(module) for module in group) for group in fields["groups"])
        listed = enumerate(fields["adapters"].items())
        adapters = {name: _entry(i, name, entry, len(groups)) for i, (name, entry) in listed}
        # A copy refers to an adapter that has numbers of its own.
        owners = {entry.number: entry for entry in adapters.values() if entry.kind in ("joint", "alone")}
        for entry in adapters.values():
            owner = owners.get(-1 if entry.numbers is None else entry.numbers)
            _require((owner is None) == (entry.kind == "stored") and (owner is None or owner.group == entry.group))
            _require(owner is None or entry.kind == "copy" or owner is entry)
        digests = fields["digests"]
        _require(digests.keys() == stored.tensors.keys() and all(map(is_safe_text, digests.values())))
        error = finite_number(fields["error"])
        _require(error is not None)
    # These are all exceptions that a missing field, or one of another type, can raise.
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
        raise FormatError("its table of contents is damaged", fix=DAMAGED) from problem
    return Contents(float(error or 0), groups, adapters, digests)


def _require(sound: bool) -> None:
    if not sound:
        raise ValueError


def _entry(number: int, name: str, fields: Any, groups: int) -> Entry:
    kind, error, numbers, group = (fields[key] for key in ("kind", "error", "numbers", "group"))
    # The name becomes a file name in scripts, so it has to be a plain relative path.
    _require(is_relative_name(name) and kind in get_args(Kind) and finite_number(error) is not None and error >= 0)
    _require(numbers is None or type(numbers) is int)
    _require(group is None or (type(group) is int and 0 <= group < groups))
    _require(type(fields["bytes"]) is int and fields["bytes"] >= 0)
    return Entry(number, kind, float(error), numbers, group, fields["bytes"])


def _shape(entry: Any) -> SharedShape:
    shape = SharedShape(*entry)
    _require(all(type(n) is int and n >= 0 for n in shape) and shape.out > 0 and shape.in_ > 0)
    _require(shape.p <= shape.out and shape.q <= shape.in_)
    return shape
