"""`Fleet`: the index of a collection of adapters."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Self, final

from loralens.core.adapter import Adapter
from loralens.core.messages import command_line
from loralens.errors import FormatError
from loralens.fleet.catalogue.reading import commit_number, read_norms, read_signature, read_stamps, read_state
from loralens.fleet.catalogue.schema import FOLDER, find_home, index_command

if TYPE_CHECKING:
    from loralens.fleet.answers.empty import EmptyResult
    from loralens.fleet.answers.rows import RowsResult
    from loralens.fleet.answers.stats import StatsResult
    from loralens.fleet.bases.bases import BasesResult
    from loralens.fleet.catalogue.members import Member, Signature, Unreadable
    from loralens.fleet.catalogue.reading import FleetState
    from loralens.fleet.grouping.copies_result import CopiesResult
    from loralens.fleet.grouping.families import FamiliesResult
    from loralens.fleet.grouping.runs import RunsResult
    from loralens.fleet.indexing.update_result import UpdateResult
    from loralens.fleet.search.lookup import MemberLookup
    from loralens.fleet.search.near import NearResult
    from loralens.fleet.sketching.sketches import Sketch, Sketches


@final
class Fleet:
    """The index of a collection of adapters: a catalogue, and a sketch of every update.

    Attributes
    ----------
    home : Path
        The folder of the index.

    Notes
    -----
    Answers are about the last committed state of the index. Another process may update it at any time.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._state: FleetState | None = None
        self._signatures: dict[str, Signature] = {}
        self._lookup: MemberLookup | None = None

    @classmethod
    def open(cls, home: str | PathLike[str] = ".") -> Self:
        """Open the index at ``home``, or in the folder ``.loralens-fleet`` within it.

        There need not be an index yet: `update` makes it. Everything that reads an index raises an OptionError if there
        is none.
        """
        return cls(find_home(Path(home)))

    def __repr__(self) -> str:
        return f"Fleet({str(self.home)!r})"

    @property
    def root(self) -> Path:
        """The folder of the adapters."""
        return self._read().root

    @property
    def index_command(self) -> str:
        """The command that updates this index, as a user types it."""
        state = self._read()
        return index_command(self.home, state.root, settings=state.settings)

    def command(self, *words: str, last: str = "") -> str:
        """A sub-command of ``loralens fleet`` on this index, as a user types it in the current folder."""
        # The index in the current folder is the default.
        named = self.home.parent if self.home.name == FOLDER else self.home
        place = [] if named == Path() else ["--fleet", str(named)]
        return command_line("loralens", "fleet", *words, *place, *([last] if last else []))

    def update(
        self,
        root: str | PathLike[str] | None = None,
        executor: Executor | None = None,
        *,
        jobs: int | None = None,
        once: bool = False,
    ) -> "UpdateResult":
        """Index what is new or has changed under ``root``, and forget what is gone.

        Parameters
        ----------
        root : path, optional
            The folder of the adapters; by default that of the last update.
        executor : Executor, optional
            Measures the files: a pool of threads or processes, or ``distributed.Client(…).get_executor(pure=False)``
            for several machines that share the disk. By default threads of this process.
        jobs : int, optional
            Without an executor, measure the files in this many processes.
        once : bool
            As in `loralens.load`. If it differs from that of the last update, every file is measured again.

        Returns
        -------
        UpdateResult
            What has changed, and which files cannot be read.

        Raises
        ------
        OptionError
            ``root`` is not a folder, or is empty although the index has adapters of it; another process updates the
            index; or the executor is broken.
        FormatError
            The disk cannot be written.
        """
        from loralens.fleet.indexing.updating import update_index

        folder = None if root is None else Path(root)
        # As long as sketches are mapped, no slot is used again.
        self._state = None
        return update_index(self.home, folder, executor, jobs=jobs, once=once)

    # What the index has

    def _read(self) -> "FleetState":
        """The last committed state."""
        if self._state is None or self._state.commit != commit_number(self.home):
            self._state, self._signatures = read_state(self.home), {}
        return self._state

    def members(self) -> "Sequence[Member]":
        """The adapters, in order of their names."""
        return self._read().members

    def unreadable(self) -> "Sequence[Unreadable]":
        """The files that should be adapters and cannot be read, in order of their names."""
        return self._read().unreadable

    def changes(self) -> Mapping[str, int]:
        """How many files are ``new``, ``changed`` and ``gone`` since the last update; kinds without files are left out.

        The folders are looked through, and no file is read.
        """
        from loralens.fleet.indexing.scanning import count_changes

        state = self._read()
        return count_changes(state.root, self.home, read_stamps(self.home))

    def sketches(self) -> "Sketches":
        """The sketches; row i belongs to ``members()[i]``."""
        return self._read().sketches

    def snapshot(self) -> "tuple[Sequence[Member], Sketches]":
        """`members` and `sketches` of one state of the index, also while another process updates it."""
        state = self._read()
        return state.members, state.sketches

    def signature(self, member: "Member") -> "Signature":
        """The names and shapes of the modules of a member."""
        if member.signature not in self._signatures:
            self._signatures[member.signature] = read_signature(self.home, member.signature)
        return self._signatures[member.signature]

    def lookup(self, members: "Sequence[Member]") -> "MemberLookup":
        """The members of a `snapshot` by name, file and modules; made once for each state."""
        from loralens.fleet.search.lookup import MemberLookup

        if self._lookup is None or self._lookup.members is not members:
            self._lookup = MemberLookup(members)
        return self._lookup

    def norms(self, member: "Member") -> Mapping[str, float]:
        """Normalised name of a module → ‖ΔW‖_F, with five digits, in the order of ``signature(member).keys``."""
        return read_norms(self.home, member)

    def adapter(self, member: "Member") -> Adapter:
        """The adapter itself, read from its file as the index has read it.

        Raises
        ------
        FormatError
            The file has changed since it was indexed, or is gone.
        """
        from loralens.formats import load

        # One state for all questions, since each look whether it is the last one opens the catalogue.
        state = self._read()
        self._check_unchanged(state, member)
        return load(member.path, strict=False, once="once=True" in state.settings)

    def check_unchanged(self, member: "Member") -> None:
        """Refuse a file that has changed since it was indexed, or is gone.

        Raises
        ------
        FormatError
        """
        self._check_unchanged(self._read(), member)

    def _check_unchanged(self, state: "FleetState", member: "Member") -> None:
        from loralens.fleet.indexing.scanning import stamp_of

        if stamp_of(member.path) != state.stamps.get(member.number):
            raise FormatError(
                f"{member.path}: has changed since it was indexed, or is gone",
                fix=f"update the index: {self.index_command}",
            )

    def modules(self, adapter: Adapter) -> Mapping[str, str]:
        """Normalised name → the name in this adapter, in order of the normalised names."""
        from loralens.fleet.sketching.module_keys import module_keys

        return dict(sorted((key, name) for name, key in module_keys(adapter).items()))

    def sketch(self, adapter: Adapter) -> "Sketch":
        """The sketch of any adapter, in the index or not.

        Raises
        ------
        FormatError
            A module holds NaN or Inf.
        """
        from loralens.core.threads import single_blas_thread
        from loralens.fleet.sketching.measures import measure_adapter

        with single_blas_thread():
            return measure_adapter(adapter).sketch

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

    def empty(self) -> "EmptyResult":
        """The members with modules whose ΔW is 0, those first that change no weight at all."""
        from loralens.fleet.answers.empty import empty_members

        state = self._read()
        return empty_members(state.root, state.members)

    def stats(self) -> "StatsResult":
        """The fleet in numbers: sizes, ranks, dialects."""
        from loralens.fleet.answers.stats import count_members

        state = self._read()
        command = self.command("stats", last="--above")
        return count_members(state.root, self.home, state.members, len(state.unreadable), command)

    def rows(self, sql: str) -> "RowsResult":
        """The answer of the catalogue to one SELECT.

        The tables are ``adapters``, ``unreadable``, ``files`` (both, and files without LoRA pairs) and ``signatures``.
        The catalogue is opened for reading only, and an answer may take 30 seconds and 256 MiB at most.

        Raises
        ------
        OptionError
            It is not one valid SELECT, or exceeds these limits.
        """
        from loralens.fleet.answers.rows import select_rows

        return select_rows(self.home, sql)
