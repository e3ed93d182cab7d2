"""Finding the members of a fleet by name, by file and by modules, in arrays that are made once for each state."""

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import LoraLensError
from loralens.fleet.catalogue.members import Member
from loralens.fleet.indexing.scanning import real_of
from loralens.fleet.search.inner import ModuleKey
from loralens.formats.files.location import adapter_file

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet

SIMILAR = 3  # names that are shown if no member has a name
LOOKED_AT = 10_000  # most names that are compared with a misspelt one; they take a second


@final
class MemberLookup:
    """The members of one state of an index, by name, file and signature.

    Attributes
    ----------
    members : sequence of Member
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = members
        self._by_name = {member.name: row for row, member in enumerate(members)}
        self._by_file = {member.real: row for row, member in reversed(list(enumerate(members)))}
        self._files = _numbers_of([member.real for member in members])
        self._signatures = _numbers_of([member.signature for member in members])
        # A row of each signature.
        self._of_signature = np.unique(self._signatures, return_index=True)[1]

    def row_of(self, source: str | PathLike[str]) -> int | None:
        """The row of a member by its file, its folder if that holds no other one, or its name; None if it is none."""
        text = os.fspath(source)
        # A path that exists is meant as a path.
        if not os.path.lexists(text):
            return self._by_name.get(text.rstrip("/"))
        path = Path(text)
        if path.is_dir():
            try:
                path = adapter_file(path)
            except LoraLensError:  # several adapters, or none: `load` says so
                return None
        return self._by_file.get(real_of(path))

    def nearest_names(self, text: str) -> list[str]:
        """Up to three names of members that contain a text, or that are similar to it if none does."""
        from difflib import get_close_matches  # only when something is wrong

        names = list(self._by_name)
        containing = [name for name in names if text.lower() in name.lower()]
        return containing[:SIMILAR] or get_close_matches(text, names[:LOOKED_AT], SIMILAR)

    def of_file(self, row: int) -> NDArray[np.bool_]:
        """Whether each member has the same file as this one, through links."""
        return np.asarray(self._files == self._files[row])

    def sharing(self, fleet: "Fleet", modules: frozenset[ModuleKey]) -> NDArray[np.bool_]:
        """Whether each member has one of these modules, by name and shape."""
        shares = []
        for row in self._of_signature.tolist():
            # Few signatures occur in a fleet, and each is looked at once.
            signature = fleet.signature(self.members[row])
            shares.append(not modules.isdisjoint(zip(signature.keys, signature.shapes, strict=True)))
        return np.asarray(np.array(shares)[self._signatures], dtype=np.bool_)


def _numbers_of(words: Sequence[str]) -> NDArray[Any]:
    """The words as numbers, equal for equal words."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
