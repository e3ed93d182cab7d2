"""The work of one task of `compress`: some adapters, coded together where that pays, and each alone otherwise.

It runs in worker processes, possibly on other machines, so it gets paths and returns bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, isfinite, sqrt
from typing import Any, final

import numpy as np

from loralens.choices import QUANTISED
from loralens.compression.joint.alone import code_alone, estimate_alone
from loralens.compression.joint.group import JointCoding, code_jointly
from loralens.compression.joint.split import SplitUpdate
from loralens.core.adapter import Adapter
from loralens.core.few_bits.shared_bases import SharedBases, SharedShape, encode_cores, encode_widths
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.ranks import shared_ranks
from loralens.errors import LoraLensError
from loralens.fleet.sketching.module_keys import module_keys
from loralens.formats import load
from loralens.formats.records.fleets.about import (
    Coded,
    about_coded,
    about_stored,
    alone_numbers,
    coded_adapter,
    joint_numbers,
)
from loralens.formats.records.fleets.contents import Kind
from loralens.linalg.few_bits.columns import encode_columns, encode_entries
from loralens.linalg.few_bits.packing import Bytes

Split = dict[str, SplitUpdate]  # by the key of the module, sorted
SMALLEST = float(np.finfo(np.float64).tiny / np.finfo(np.float64).eps)  # energy of an update whose squares are exact
RETRIES = 4  # attempts to code an adapter or group until the measured error, with all rounding, is small enough
# A group is divided if the stack of its factors has more columns than this in a module: the time of an eigh grows with
# the third power, and 1,024 columns take half a second.
MOST_COLUMNS = 1024


@final
@dataclass(frozen=True, slots=True)
class FleetSource:
    """Where an adapter of a task is, and how it is read.

    Attributes
    ----------
    name : str
        Its name in the fleet.
    path : str
    copy_of : str
        The name of another source of the task, of which this is a copy; empty if it is none.
    """

    name: str
    path: str
    allow_pickle: bool = False
    once: bool = False
    copy_of: str = ""

    def load(self) -> Adapter:
        """The adapter, in the dialect in which it was before it was quantised, if it was."""
        # The file is read as by the index, which is not strict: what is wrong about the numbers is among the findings.
        adapter = load(self.path, strict=False, allow_pickle=self.allow_pickle, once=self.once)
        if adapter.format != QUANTISED:
            return adapter
        from loralens.formats.dialects.quantised.reader import expand

        return expand(adapter)


@final
@dataclass(frozen=True, slots=True)
class CodedSource:
    """An adapter of a task in its new form.

    Attributes
    ----------
    numbers : uint8 array, str or None
        Its bytes, or the name of the source that has them, or None if its tensors are stored as they were.
    group : int or None
        The number of its group within the task.
    extras : mapping of str to str
        Digest → key of the extra in the source; of the stored tensor if ``numbers`` is None.
    """

    kind: Kind
    error: float
    pair_bytes: int
    about: Mapping[str, Any]
    numbers: Bytes | str | None
    group: int | None
    extras: Mapping[str, str]


@final
@dataclass(frozen=True, slots=True)
class CodedGroup:
    """The bases of a group: the shapes of its modules, and the bytes of out, in and widths."""

    shapes: tuple[SharedShape, ...]
    parts: tuple[Bytes, Bytes, Bytes]

    def bases(self) -> tuple[SharedBases, int]:
        """The bases as they are read from the file, and the number of their bytes."""
        out, in_, widths = self.parts
        return SharedBases.of(LazyArray.of(out), LazyArray.of(in_), widths, self.shapes), sum(map(len, self.parts))


@final
@dataclass(slots=True)
class CodedTask:
    """The result of a task: sources by name, groups, and the reasons of sources that cannot be written."""

    sources: dict[str, CodedSource] = field(default_factory=dict)
    groups: list[CodedGroup] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def code_group(sources: Sequence[FleetSource], error: float) -> CodedTask:
    """Code some adapters: each as a copy, jointly or alone, whichever takes the fewest bytes at this error."""
    task = CodedTask()
    adapters: dict[str, Adapter] = {}
    splits: dict[str, Split] = {}
    for source in sources:
        try:
            adapters[source.name] = adapter = source.load()
            split = _split(adapter) if is_codable(adapter) else {}
        except LoraLensError as refused:
            task.refused[source.name] = _reason(refused)
            continue
        if split and _has_error(split):
            splits[source.name] = split
        else:
            _store(task, source.name, adapter)
    copies = {s.name: s.copy_of for s in sources if s.copy_of in splits and s.name in splits}
    own = {name: split for name, split in splits.items() if name not in copies}
    for part in _parts_of_equal_shapes(own):
        _code_part(task, {name: own[name] for name in part}, adapters, error)
    for name, original in copies.items():
        try:
            is_coded = _code_copy(task, name, original, adapters, splits[name], error)
        except LoraLensError:  # the numbers of the original do not fit the dtypes of the copy
            is_coded = False
        # The original may have been stored as it was, and a copy that differs from it may miss the error.
        if not is_coded:
            _code_single(task, name, adapters[name], splits[name], error)
    return task


def is_codable(adapter: Adapter) -> bool:
    """Whether every update is a plain pair, whose factors may be replaced by others of the same product."""
    return len(adapter) > 0 and all(
        isinstance(module, LowRank)
        and module.layout.kind != "merged"
        # B of a grouped convolution is block-diagonal, and other factors of the product would not be.
        and not (module.layout.kind == "conv" and module.layout.groups > 1)
        # The rows are in the order of other software, and only its own format can record that.
        and not module.layout.rows
        for module in adapter.modules.values()
    )


def _split(adapter: Adapter) -> Split:
    return {key: SplitUpdate.of(adapter[name]) for key, name in _names(adapter).items()}  # type: ignore[arg-type]


def _has_error(split: Split) -> bool:
    """Whether an error can be stated: squares of norms over 1e154 are Inf, and those of norms under 1e-146 inexact."""
    energies = [update.energy for update in split.values()]
    is_zero = not any(update.left.any() for update in split.values())
    return all(map(isfinite, energies)) and (is_zero or sum(energies) >= SMALLEST)


def _names(adapter: Adapter) -> dict[str, str]:
    """The key of a module, under which the adapters of a fleet are compared → its name, in order of the keys."""
    return dict(sorted((key, name) for name, key in module_keys(adapter).items()))


def _parts_of_equal_shapes(splits: Mapping[str, Split]) -> list[list[str]]:
    """The adapters that can share bases: those with modules of the same names and shapes, not too many at a time."""
    alike: dict[Any, list[str]] = {}
    for name, split in splits.items():
        # An update of 0 has no directions to share.
        zero = not any(update.energy for update in split.values())
        signature = tuple((key, update.shape) for key, update in split.items())
        alike.setdefault(name if zero else signature, []).append(name)
    parts = []
    for names in alike.values():
        widest = max(update.left.shape[1] for name in names for update in splits[name].values())
        count = -(-len(names) * widest // MOST_COLUMNS)
        size = -(-len(names) // count)
        parts += [names[i : i + size] for i in range(0, len(names), size)]
    return parts


def _code_part(task: CodedTask, splits: Mapping[str, Split], adapters: Mapping[str, Adapter], error: float) -> None:
    """Code adapters with the same names and shapes."""
    remaining = list(splits)
    # Adapters that the first bases do not fit may fit others.
    while len(remaining) > 1:
        coded = _code_jointly(task, {name: splits[name] for name in remaining}, adapters, error)
        if not coded:
            break
        remaining = [name for name in remaining if name not in coded]
    for name in remaining:
        _code_single(task, name, adapters[name], splits[name], error)


def _code_jointly(
    task: CodedTask, splits: Mapping[str, Split], adapters: Mapping[str, Adapter], error: float
) -> set[str]:
    """Add a group to the task; returns the names of its members, or nothing if no group pays."""
    names, aim = list(splits), error
    updates = [list(split.values()) for split in splits.values()]
    alone = [estimate_alone(split, error=error) for split in splits.values()]
    for _ in range(RETRIES):
        coding = code_jointly(updates, alone, error=aim)
        if coding is None:
            return set()
        group, cores = _encode(coding, updates[0])
        bases, nbytes = group.bases()
        members: dict[str, CodedSource] = {}
        for i, data in zip(coding.members, cores, strict=True):
            name = names[i]
            place = {key: number for number, key in enumerate(splits[name])}
            frame = {module: place[key] for key, module in _names(adapters[name]).items()}
            about, _ = about_coded(adapters[name], frame)
            coded = joint_numbers(bases, data, nbytes)
            try:
                measured = error_of_bytes(adapters[name], splits[name], about, coded)
            except LoraLensError:  # its numbers are out of the range of a dtype
                continue
            if not isfinite(measured):
                continue
            extras = {digest: key for key, digest in about["extras"].items()}
            members[name] = CodedSource(
                "joint", measured, adapters[name].nbytes, about, data, len(task.groups), extras
            )  # fmt: skip
        # Factors are cut to the rank of the source and rounded to its dtype, which the coding does not see.
        worst = max((source.error for source in members.values()), default=inf)
        if worst <= error:
            task.groups.append(group)
            task.sources |= members
            return set(members)
        aim *= error / worst * 0.999
        if not members:
            break
    return set()


def _encode(coding: JointCoding, updates: Sequence[SplitUpdate]) -> tuple[CodedGroup, Bytes]:
    """The bytes of the bases, and those of the cores (n, size)."""
    shapes = tuple(
        SharedShape(*update.shape, len(module.out.bits), len(module.in_.bits))
        for update, module in zip(updates, coding.bases, strict=True)
    )
    out, in_ = (np.concatenate([encode_columns(module[side]) for module in coding.bases]) for side in (0, 1))
    cores = encode_cores(coding.steps, encode_entries(coding.integers, coding.widths))
    return CodedGroup(shapes, (out, in_, encode_widths(coding.widths))), cores


def _code_single(task: CodedTask, name: str, adapter: Adapter, split: Split, error: float) -> None:
    """Code an adapter alone, or store it as it is if that takes fewer bytes or if its numbers cannot be coded."""
    try:
        is_coded = _code_alone(task, name, adapter, split, error)
    except LoraLensError:  # numbers that are out of the range of a dtype, for example
        is_coded = False
    if not is_coded:
        _store(task, name, adapter)


def _code_alone(task: CodedTask, name: str, adapter: Adapter, split: Split, error: float) -> bool:
    """Add an adapter in few bits; returns whether it keeps the error and becomes smaller."""
    keys, aim = _names(adapter), error
    by_name = {keys[key]: update for key, update in split.items()}
    for _ in range(RETRIES):
        coding = code_alone(by_name, error=aim, shared=shared_ranks(adapter.modules))
        parts = [(*by_name[module].shape, len(product.bits)) for module, product in coding.products.items()]
        frame = {module: number for number, module in enumerate(coding.products)}
        about, _ = about_coded(adapter, frame, parts)
        data = np.concatenate(list(coding.parts.values()))
        coded = alone_numbers(about["parts"], LazyArray.of(data))
        measured = error_of_bytes(adapter, split, about, coded)
        if measured <= error or len(data) >= adapter.nbytes or not isfinite(measured):
            break
        aim *= error / measured * 0.999
    if not measured <= error or len(data) >= adapter.nbytes:
        return False
    extras = {digest: key for key, digest in about["extras"].items()}
    task.sources[name] = CodedSource("alone", measured, adapter.nbytes, about, data, None, extras)
    return True


def _code_copy(
    task: CodedTask, name: str, original: str, adapters: Mapping[str, Adapter], split: Split, error: float
) -> bool:
    """Add an adapter that uses the numbers of another one; returns whether it keeps the error with them."""
    owner = task.sources.get(original)
    names, names_of_original = _names(adapters[name]), _names(adapters[original])
    if owner is None or not isinstance(owner.numbers, np.ndarray) or names.keys() != names_of_original.keys():
        return False
    frame = {module: owner.about["frame"][names_of_original[key]] for key, module in names.items()}
    about, _ = about_coded(adapters[name], frame, owner.about.get("parts"))
    coded = _numbers(task, owner)
    if any(coded.shapes[frame[module]] != update.shape for module, update in adapters[name].items()):
        return False
    measured = error_of_bytes(adapters[name], split, about, coded)
    if measured > error:
        return False
    extras = {digest: key for key, digest in about["extras"].items()}
    task.sources[name] = CodedSource("copy", measured, adapters[name].nbytes, about, original, owner.group, extras)
    return True


def _numbers(task: CodedTask, owner: CodedSource) -> Coded:
    """The numbers of an adapter of the task, as they are read from the file."""
    assert isinstance(owner.numbers, np.ndarray)
    if owner.group is None:
        return alone_numbers(owner.about["parts"], LazyArray.of(owner.numbers))
    bases, nbytes = task.groups[owner.group].bases()
    return joint_numbers(bases, owner.numbers, nbytes)


def _store(task: CodedTask, name: str, adapter: Adapter) -> None:
    """Add an adapter as it is, or the reason why that is impossible."""
    try:
        about, _ = about_stored(adapter)
    except LoraLensError as error:
        task.refused[name] = _reason(error)
        return
    extras = {digest: key for key, digest in about["tensors"].items()}
    task.sources[name] = CodedSource("stored", 0.0, adapter.nbytes, about, None, None, extras)


def _reason(error: LoraLensError) -> str:
    return ": ".join((*error.where, error.what))


def error_of_bytes(adapter: Adapter, split: Split, about: Mapping[str, Any], coded: Coded) -> float:
    """‖ΔW − ΔW'‖/‖ΔW‖ of the adapter that the bytes give back; 0 if the adapter is 0 and stays so."""
    nothing: Callable[[str], LazyArray] = lambda _: LazyArray.of(np.empty(0, np.float32))  # noqa: E731 - not read
    after = coded_adapter(about, coded, nothing)
    squares = 0.0
    for key, name in _names(adapter).items():
        module = after[name]
        assert isinstance(module, LowRank)
        squares += split[key].squared_distance(module.scale * module.B.astype(np.float64), module.A)
    norm = sqrt(sum(update.energy for update in split.values()))
    return sqrt(squares) / norm if norm else float(squares > 0)
