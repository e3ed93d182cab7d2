"""Reading loralens-q, the dialect for modules in few bits: ``adapter_quantised.safetensors``, one file with everything.

It has one uint8 tensor ``<module>.q`` for each module, whose layout is described in `loralens.core.few_bits.quantised`,
and every tensor that is not half of a pair, unchanged, under ``extra/<its key>``. In the header metadata, under
``loralens-q``, there is a JSON object:

============  ==========================================================================================
version       1
source        the dialect that the adapter came from
base_model    the model that it was trained on, or null
modules       name → [out, in, directions, number of its scaling, number of its layout]
scalings      [scale, formula, alpha, rank, origin of the scale] of each kind that occurs
layouts       [kind, kernel, groups, transposed] of each kind that occurs, and the order of rows if it is not usual
extra         key → [role, module, parameter]
findings      [level, code, text, fix] of each finding of the source's reader
config        the configuration beside the source's file, or null
metadata      the source's header metadata, or null
narrowed      whether modules were removed since the configuration was written
peft          fields of a PEFT configuration that the source's dialect cannot store; missing if there are none
============  ==========================================================================================

Converting the file gives an adapter of its source's dialect again, with configuration, metadata and extras. Its factors
are float32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final, get_args

from loralens.choices import Level
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.few_bits.quantised import NAME, PART, from_bytes, kernel_fits
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, place
from loralens.formats.dialects.peft.fields import valid_fields
from loralens.formats.dialects.record import is_valid_scaling
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import finite_number, is_safe_text, plain_text, unique_keys

# of the layout; a reader refuses any other
VERSION = 1
EXTRA = "extra/"

_BROKEN = "the file is damaged: download or save it again"


def detect(stored: Stored) -> bool:
    """Whether a file is loralens-q by its metadata."""
    return NAME in (stored.metadata or {})


def read(stored: Stored) -> Adapter:
    """The adapter of a ``loralens-q`` file.

    Raises
    ------
    FormatError
        The description does not fit the tensors, is damaged, or is of a newer version.
    """
    fields = description(stored.metadata)
    # Checked before anything else, because a newer version may have other fields.
    if fields.get("version") != VERSION:
        what = f"is {NAME} of version {fields.get('version')!a:.20}, but this loralens knows {VERSION}"
        raise FormatError(what, fix="update loralens")
    outline = parse_description(fields)
    entries, extras = outline.modules, outline.extra
    # Checked before tensors are looked up: every key must be in the description, and the other way round.
    _check_keys(stored, entries, extras)
    modules = {}
    for name in entries:
        with place(name):
            modules[name] = _module(stored, name, outline)
    return Adapter(
        modules=modules,
        extra={key: outline.extra_tensor(key, stored.tensors[EXTRA + key]) for key in extras},
        config=fields["config"],
        metadata=stored.metadata,
        format=NAME,
        base_model=outline.base_model,
        findings=outline.findings,
        narrowed=fields["narrowed"],
        peft_fields=outline.peft_fields,
    )


@final
@dataclass(frozen=True, slots=True)
class Outline:
    """The checked fields of a description; those that are not listed here are used as they are.

    Attributes
    ----------
    modules : mapping of str to entry
        The entries are not checked yet: `module` does that.
    scalings : list of float and Scaling
    """

    modules: Mapping[str, Any]
    scalings: list[tuple[float, Scaling]]
    layouts: list[Layout]
    extra: Mapping[str, Any]
    findings: tuple[Finding, ...]
    base_model: str | None
    peft_fields: Mapping[str, Any]

    def module(self, name: str) -> tuple[tuple[int, int], int, float, Scaling, Layout]:
        """Shape, rank, scale, scaling and layout of a module.

        Raises
        ------
        FormatError
            Its entry is damaged.
        """
        entry = self.modules[name]
        well_formed = isinstance(entry, list) and len(entry) == 5 and all(type(x) is int and x >= 0 for x in entry)
        # Every number of the description is an index or a size, which a damaged file may have wrong.
        if not (well_formed and entry[3] < len(self.scalings) and entry[4] < len(self.layouts) and entry[0] * entry[1]):
            raise FormatError("its description is damaged", fix=_BROKEN)
        out, in_, rank, scaling, layout = entry
        # A small file must not ask for arrays that are larger than its update.
        if rank > min(out, in_) or not kernel_fits(self.layouts[layout], (out, in_)):
            raise FormatError(f"{rank} directions or a kernel do not fit ({out}, {in_})", fix=_BROKEN)
        return (out, in_), rank, *self.scalings[scaling], self.layouts[layout]

    def extra_tensor(self, key: str, tensor: LazyArray) -> Extra:
        """The extra of a key."""
        entry = self.extra[key]
        if not (isinstance(entry, list) and len(entry) == 3 and all(map(is_safe_text, entry))):
            raise FormatError(f"the description of {key} is damaged", fix=_BROKEN)
        role, module, parameter = entry
        return Extra(role, module, tensor, parameter)


def parse_description(fields: Mapping[str, Any]) -> Outline:
    """Check the fields of a description.

    Raises
    ------
    FormatError
        A field is missing or has another type.
    """
    try:
        texts = fields["metadata"]
        _check(texts is None or all(isinstance(text, str) for text in texts.values()))
        _check(fields["config"] is None or isinstance(fields["config"], dict))
        _check(is_safe_text(fields["source"]))
        _check(isinstance(fields["narrowed"], bool))
        return Outline(
            dict(fields["modules"]),
            [_scaling(entry) for entry in fields["scalings"]],
            [_layout(entry) for entry in fields["layouts"]],
            dict(fields["extra"]),
            tuple(_finding(entry) for entry in fields["findings"]),
            plain_text(fields.get("base_model")),
            valid_fields(fields.get("peft")),
        )
    # These are all exceptions that a missing field, or one of another type, can raise.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError("its description is damaged", fix=_BROKEN) from error


def description(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The JSON object that describes a file.

    Raises
    ------
    FormatError
        The metadata have none.
    """
    try:
        fields = json.loads((metadata or {})[NAME], object_pairs_hook=unique_keys)
    except (KeyError, ValueError, RecursionError) as error:
        raise FormatError(f"has no description under {NAME} in its metadata", fix=_BROKEN) from error
    if not isinstance(fields, dict):
        raise FormatError("its description is not a JSON object", fix=_BROKEN)
    return fields


def expand(adapter: Adapter) -> Adapter:
    """The adapter in the dialect of its source, with float32 factors and without a connection to its file.

    An adapter that was made in loralens-q and never written has no description, so its dialect stays.
    """
    modules = {name: module.without_origin() for name, module in adapter.items()}
    if not detect(Stored({}, adapter.metadata)):
        return replace(adapter, modules=modules)
    fields = description(adapter.metadata)
    return replace(adapter, modules=modules, format=fields["source"], metadata=fields["metadata"])


def _check_keys(stored: Stored, modules: Mapping[str, Any], extras: Mapping[str, Any]) -> None:
    expected = {f"{name}.{PART}" for name in modules} | {EXTRA + key for key in extras}
    if not modules:
        raise FormatError("holds no modules", fix=_BROKEN)
    # Sorted, so that the message is the same each time.
    for key in sorted(expected - set(stored.tensors)):
        raise FormatError(f"{key} is missing", fix=_BROKEN)
    for key in sorted(set(stored.tensors) - expected):
        raise FormatError(f"{key} is not in the description", fix=_BROKEN)


def _module(stored: Stored, name: str, outline: Outline) -> LowRank:
    shape, rank, scale, how, layout = outline.module(name)
    key = f"{name}.{PART}"
    return from_bytes(stored.tensors[key], shape, rank=rank, scale=scale, scaling=how, layout=layout, key=key)


def _scaling(entry: Any) -> tuple[float, Scaling]:
    scale, formula, alpha, rank, origin = entry
    _check(finite_number(scale) is not None and is_valid_scaling(formula, alpha, rank, origin))
    return float(scale), Scaling(formula, alpha, rank, origin)


def _layout(entry: Any) -> Layout:
    kind, kernel, groups, transposed, *order = entry
    # Files that were written before this field existed have four entries.
    rows = order[0] if order else ""
    _check(len(order) < 2 and is_safe_text(kind) and is_safe_text(rows))
    _check(isinstance(transposed, bool) and all(type(number) is int for number in (groups, *kernel)))
    return Layout(kind, tuple(kernel), groups, transposed, rows)


def _finding(entry: Any) -> Finding:
    level, code, text, fix = entry
    _check(level in get_args(Level) and all(map(is_safe_text, (code, text, fix))))
    return Finding(level, code, text, fix)


def _check(sound: bool) -> None:
    """Raise a ValueError, which `read` reports as damage, if a part of the description is not valid."""
    if not sound:
        raise ValueError
