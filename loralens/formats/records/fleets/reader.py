"""Reading a compressed fleet: `FleetFile` gives its adapters one at a time."""

from collections.abc import Mapping
from functools import lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.few_bits.shared_bases import SharedBases
from loralens.core.lazy import LazyArray
from loralens.core.names import nearest
from loralens.errors import FormatError, OptionError, place
from loralens.formats.files.container import read_safetensors
from loralens.formats.files.json_text import parse_object
from loralens.formats.files.location import existing_file
from loralens.formats.records.fleets.about import alone_numbers, coded_adapter, joint_numbers, stored_adapter
from loralens.formats.records.fleets.contents import (
    DAMAGED,
    Contents,
    Entry,
    about_key,
    extra_key,
    group_keys,
    numbers_key,
    parse_contents,
    tensor_digest,
)

GROUPS_KEPT = 2  # groups whose bases stay in memory, as adapters of one group are expanded one after the other


@final
class FleetFile:
    """A compressed fleet that is open for reading.

    Attributes
    ----------
    path : Path
    contents : Contents
        The table of contents; ``contents.adapters`` has the names.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = existing_file(Path(path), fix="give the file that loralens fleet compress wrote")
        stored = read_safetensors(self.path)
        with place(self.path):
            self.contents: Contents = parse_contents(stored)
        self._tensors: Mapping[str, LazyArray] = stored.tensors
        self._checked: set[str] = set()
        self._bases = lru_cache(GROUPS_KEPT)(self._read_bases)

    def entry(self, name: str) -> Entry:
        """The row of an adapter in the table of contents.

        Raises
        ------
        OptionError
            There is no adapter of this name.
        """
        if name not in self.contents.adapters:
            raise OptionError(
                f"{self.path}: no adapter {name!r}",
                fix=f"the nearest names are {nearest(name, self.contents.adapters)}",
            )
        return self.contents.adapters[name]

    def adapter(self, name: str, *, rank: int | None = None) -> Adapter:
        """An adapter of the fleet, whose factors are computed when they are read.

        Parameters
        ----------
        rank : int, optional
            The largest rank of a module; by default every module has the rank that it had before compression.

        Raises
        ------
        OptionError
            There is no adapter of this name, or the rank is not positive.
        FormatError
            The file is damaged.
        """
        if rank is not None and rank < 1:
            raise OptionError(f"the rank {rank} is not positive", fix="give a rank of at least 1")
        entry = self.entry(name)
        with place(f"{self.path}: {name}"):
            about = self._about(entry.number)
            if entry.numbers is None:
                return stored_adapter(about, self._extra)
            data = self._tensor(numbers_key(entry.numbers))
            if entry.group is None:
                coded = alone_numbers(about.get("parts"), data)
            else:
                bases, nbytes = self._bases(entry.group)
                coded = joint_numbers(bases, data.read(), nbytes + data.nbytes)
            return coded_adapter(about, coded, self._extra, rank=rank)

    def _about(self, number: int) -> dict[str, Any]:
        data = self._tensor(about_key(number)).read().tobytes()
        return parse_object(data, "utf-8", what="its description ", fix=DAMAGED)

    def _read_bases(self, group: int) -> tuple[SharedBases, int]:
        out, in_, widths = map(self._tensor, group_keys(group))
        shapes = self.contents.groups[group]
        bases = SharedBases.of(out, in_, widths.read(), shapes)
        return bases, out.nbytes + in_.nbytes + widths.nbytes

    def _extra(self, digest: str) -> LazyArray:
        return self._tensor(extra_key(digest), plain=False)

    def _tensor(self, key: str, *, plain: bool = True) -> LazyArray:
        """A tensor of the file, whose digest is checked when it is first needed; ``plain`` ones are lists of bytes."""
        tensor = self._tensors.get(key)
        if tensor is None or (plain and (tensor.dtype != "uint8" or tensor.ndim != 1)):
            raise FormatError(f"{key} is missing, or does not consist of bytes", fix=DAMAGED)
        if key not in self._checked:
            if tensor_digest(tensor) != self.contents.digests[key]:
                raise FormatError(f"{key} differs from its digest", fix=DAMAGED)
            self._checked.add(key)
        return tensor

    def own_bytes(self, name: str) -> int:
        """The bytes that replace the pairs of an adapter and of no other one; 0 for a copy."""
        entry = self.entry(name)
        if entry.numbers is None:
            return entry.pair_bytes
        return self._tensors[numbers_key(entry.number)].nbytes if entry.numbers == entry.number else 0

    @property
    def size(self) -> int:
        """The bytes of the file."""
        return self.path.stat().st_size

    def group_bytes(self, group: int) -> int:
        """The bytes of the bases and widths that a group shares."""
        return sum(self._tensors[key].nbytes for key in group_keys(group))
