"""`Fleet`: the index of a collection of adapters."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from loralens.core.adapter import Adapter

if TYPE_CHECKING:
    from loralens.fleet.bases.bases import BasesResult
    from loralens.fleet.catalogue.members import Member, Signature, Unreadable
    from loralens.fleet.grouping.copies import CopiesResult
    from loralens.fleet.grouping.families import FamiliesResult
    from loralens.fleet.grouping.runs import RunsResult
    from loralens.fleet.search.near import NearResult
    from loralens.fleet.sketching.sketches import Sketch, Sketches


@final
class Fleet:
    """The index of a collection of adapters: a catalogue, and a sketch of every update.

    Attributes
    ----------
    home : Path
        The folder of the index.
    root : Path
        The folder of the adapters.
    """

    def __init__(self, home: Path) -> None:
        self.home = home

    @classmethod
    def open(cls, home: str | PathLike[str] = ".") -> Self:
        """Open the index at ``home``, or in the folder ``.loralens-fleet`` within it.

        There need not be an index yet: `update` makes it. Everything that reads one raises an OptionError if there is
        none.
        """
        raise NotImplementedError

    @property
    def root(self) -> Path:
        """The folder of the adapters."""
        raise NotImplementedError

    def update(
        self,
        root: str | PathLike[str] | None = None,
        executor: Executor | None = None,
        *,
        allow_pickle: bool = False,
        once: bool = False,
    ) -> Any:
        """Index what is new or has changed under ``root``, and forget what is gone."""
        raise NotImplementedError

    # What the index has

    def members(self) -> "Sequence[Member]":
        """The adapters, in order of their names."""
        raise NotImplementedError

    def unreadable(self) -> "Sequence[Unreadable]":
        """The files that should be adapters and cannot be read, in order of their names."""
        raise NotImplementedError

    def sketches(self) -> "Sketches":
        """The sketches; row i belongs to ``members()[i]``."""
        raise NotImplementedError

    def snapshot(self) -> "tuple[Sequence[Member], Sketches]":
        """`members` and `sketches` of one state of the index, also while another process updates it."""
        raise NotImplementedError

    def signature(self, member: "Member") -> "Signature":
        """The names and shapes of the modules of a member."""
        raise NotImplementedError

    def norms(self, member: "Member") -> Mapping[str, float]:
        """Normalised name of a module → ‖ΔW‖_F, with five digits, in the order of ``signature(member).keys``."""
        raise NotImplementedError

    def adapter(self, member: "Member") -> Adapter:
        """The adapter itself, read from its file as the index has read it.

        Raises
        ------
        FormatError
            The file has changed since it was indexed, or is gone.
        """
        raise NotImplementedError

    def modules(self, adapter: Adapter) -> Mapping[str, str]:
        """Normalised name → the name in this adapter, in order of the normalised names."""
        raise NotImplementedError

    def sketch(self, adapter: Adapter) -> "Sketch":
        """The sketch of any adapter, in the index or not."""
        raise NotImplementedError

    # Answers

    def near(
        self, adapter: "Adapter | str | PathLike[str]", k: int = 10, *, sketch: bool = False, exact: bool = False
    ) -> "NearResult":
        """The members whose updates have the largest cosines with that of an adapter.

        Sketches propose members, and exact inner products order them. See `loralens.fleet.search.near.find_near`.
        """
        from loralens.fleet.search.near import find_near

        return find_near(self, adapter, k, sketch=sketch, exact=exact)

    def copies(self) -> "CopiesResult":
        """The members that are the same update as another, and the files that can be deleted without a loss."""
        from loralens.fleet.grouping.copies import find_copies

        return find_copies(self)

    def runs(self, *, sketch: bool = False) -> "RunsResult":
        """Groups of members that began from the same random A: checkpoints of a run, and runs with one seed."""
        from loralens.fleet.grouping.runs import find_runs

        return find_runs(self, sketch=sketch)

    def families(self, at: float = 0.5, *, sketch: bool = False) -> "FamiliesResult":
        """Groups of members whose updates are alike: average linkage of cosines, cut at a level."""
        from loralens.fleet.grouping.families import find_families

        return find_families(self, at, sketch=sketch)

    def bases(self) -> "BasesResult":
        """The base models of the members: those that they name, those that they show, and contradictions."""
        from loralens.fleet.bases.bases import find_bases

        return find_bases(self)

    def empty(self) -> Any:
        """The members that do nothing."""
        raise NotImplementedError

    def stats(self) -> Any:
        """The fleet in numbers."""
        raise NotImplementedError

    def rows(self, sql: str) -> Any:
        """The answer of the catalogue to a SELECT."""
        raise NotImplementedError

    # Joint compression

    def compress(self, output: str | PathLike[str], **options: Any) -> Any:
        """Write the fleet in less space."""
        raise NotImplementedError

    @classmethod
    def expand(cls, source: str | PathLike[str], output: str | PathLike[str], **options: Any) -> Any:
        """Write the adapters of a compressed fleet."""
        raise NotImplementedError
