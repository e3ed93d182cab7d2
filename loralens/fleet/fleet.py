"""`Fleet`: the index of a collection of adapters."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, final

from loralens.core.adapter import Adapter

if TYPE_CHECKING:
    from loralens.fleet.catalogue.members import Member, Signature, Unreadable
    from loralens.fleet.joint.result import CompressionResult, ExpansionResult
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

    def near(self, adapter: Any, k: int = 10, *, exact: bool = True) -> Any:
        """The members whose updates are most alike."""
        raise NotImplementedError

    def copies(self) -> Any:
        """Groups of members that are the same update."""
        raise NotImplementedError

    def runs(self) -> Any:
        """Groups of members that began from the same random start."""
        raise NotImplementedError

    def families(self, at: float = 0.5) -> Any:
        """Groups of members whose updates are alike."""
        raise NotImplementedError

    def bases(self) -> Any:
        """The base models of the members, named and inferred."""
        raise NotImplementedError

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

    def compress(
        self,
        output: str | PathLike[str],
        *,
        error: float = 0.15,
        executor: Executor | None = None,
        overwrite: bool = False,
    ) -> "CompressionResult":
        """Write all adapters to one file, each with at most this error, in as few bytes as possible.

        Adapters of one run share bases U and V for every module, and each has a small core C in them: ΔW ≈ U C Vᵀ.
        Copies are stored once, and so are equal heads and other tensors that belong to no pair. An adapter that takes
        fewer bytes alone is stored alone in few bits. The errors are measured on the written file.

        Parameters
        ----------
        output : path
            A ``.safetensors`` file, which appears complete or not at all. docs/fleet_file.md describes it.
        error : float
            The largest ‖ΔW − ΔW'‖/‖ΔW‖ of an adapter, over all its modules.
        executor : Executor, optional
            Where the groups are compressed; by default in this process, one at a time, which takes the least memory.
        overwrite : bool
            Replace what is there.

        Raises
        ------
        OptionError
            The error is not between 0 and 1, the target exists, or there is no adapter.
        FormatError
            A worker was killed, a file has changed meanwhile, or the disk cannot be written. Nothing is written then.
        """
        from loralens.fleet.joint.compress import compress_fleet
        from loralens.fleet.joint.sources import fleet_groups

        groups = fleet_groups(self)
        return compress_fleet(groups, Path(output), error=error, executor=executor, overwrite=overwrite)

    @staticmethod
    def expand(
        source: str | PathLike[str],
        name: str,
        output: str | PathLike[str] | None = None,
        *,
        rank: int | None = None,
        overwrite: bool = False,
    ) -> "ExpansionResult":
        """Take one adapter out of a compressed fleet, and write it as a PEFT adapter.

        Parameters
        ----------
        source : path
            The file that `compress` wrote. No index is needed.
        name : str
            The name of the adapter in the fleet.
        output : path, optional
            The folder to write. Without it nothing is written, and the result holds the adapter.
        rank : int, optional
            The largest rank of a module. By default every module has the rank that it had before.
        overwrite : bool
            Replace what is there.

        Raises
        ------
        OptionError
            There is no such adapter, the rank is not positive, or the target exists.
        FormatError
            The file is damaged, or PEFT cannot hold something of the adapter.
        """
        from loralens.fleet.joint.expand import expand_adapter

        return expand_adapter(source, name, output, rank=rank, overwrite=overwrite)
