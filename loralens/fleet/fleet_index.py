"""`FleetIndex`: the index of a collection of adapters, as questions read it."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Self, TypeVar

from loralens.core.adapter import Adapter
from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count, single_blas_thread
from loralens.errors import FormatError, LoraLensError
from loralens.fleet.catalogue import (
    CATALOGUE,
    FleetState,
    Member,
    Signature,
    Unreadable,
    catalogue_errors,
    find_home,
    index_command,
    read_norms,
    read_state,
    to_signature,
)
from loralens.fleet.likeness import ExactUpdate
from loralens.fleet.measuring import measure_adapter
from loralens.fleet.sketches import Sketch, Sketches, module_keys
from loralens.fleet.updating import count_changes, stamp_of
from loralens.formats import load
from loralens.tables.numbers import count

Task = TypeVar("Task", bound=Hashable)
Answer = TypeVar("Answer")


class FleetIndex:
    """The index of a collection of adapters: a catalogue, and a sketch of every update.

    Attributes
    ----------
    home : Path
        The folder of the index.

    Notes
    -----
    Answers are about the last complete state of the index. Another process may update it at any time.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._state: FleetState | None = None
        self._file = 0, 0, 0

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
    def state(self) -> FleetState:
        """The last complete state. An update replaces the catalogue as a whole, so that the file itself says which."""
        try:
            status = (self.home / CATALOGUE).lstat()
            file = status.st_ino, status.st_mtime_ns, status.st_size
        except OSError:  # the reading says why
            file = 0, 0, 0
        if self._state is None or file != self._file:
            self._state, self._file = read_state(self.home), file
        return self._state

    @property
    def root(self) -> Path:
        """The folder of the adapters."""
        return self.state.root

    @property
    def index_command(self) -> str:
        """The command that updates this index, as a user types it."""
        return index_command(self.home, self.state.root, reading=self.state.reading)

    def members(self) -> Sequence[Member]:
        """The adapters, in order of their names."""
        return self.state.members

    def unreadable(self) -> Sequence[Unreadable]:
        """The files that should be adapters and cannot be read, in order of their names."""
        return self.state.unreadable

    def changes(self) -> Mapping[str, int]:
        """How many files are ``new``, ``changed`` and ``gone`` since the last update; kinds without files are left out.

        The folders are looked through, and no file is read.
        """
        return count_changes(self.state, self.home)

    def sketches(self) -> Sketches:
        """The sketches; row i belongs to ``members()[i]``."""
        return self.state.sketches

    def snapshot(self) -> tuple[Sequence[Member], Sketches]:
        """`members` and `sketches` of one state of the index, also while another process updates it."""
        state = self.state
        return state.members, state.sketches

    def signature(self, member: Member) -> Signature:
        """The names and shapes of the modules of a member."""
        with catalogue_errors(self.home):
            return to_signature(self.state.signatures.get(member.signature, ""))

    def norms(self, member: Member) -> Mapping[str, float]:
        """Normalised name of a module → ‖ΔW‖_F, with five digits, in the order of ``signature(member).keys``."""
        return read_norms(self.home, member, self.signature(member))

    def adapter(self, member: Member) -> Adapter:
        """The adapter itself, read from its file as the index has read it.

        Raises
        ------
        FormatError
            The file has changed since it was indexed, or is gone.
        """
        self.check_unchanged(member)
        return load(member.path, strict=False, once="once=True" in self.state.reading)

    def check_unchanged(self, member: Member) -> None:
        """Refuse a file that has changed since it was indexed, or is gone.

        Raises
        ------
        FormatError
        """
        state = self.state
        row = state.files.get(str(member.path.relative_to(state.root)))
        if not row or stamp_of(member.path) != row.stamp:
            raise FormatError(
                f"{member.path}: has changed since it was indexed, or is gone",
                fix=f"update the index: {self.index_command}",
            )

    def modules(self, adapter: Adapter) -> Mapping[str, str]:
        """Normalised name → the name in this adapter, in order of the normalised names."""
        return dict(sorted((key, name) for name, key in module_keys(adapter).items()))

    def sketch(self, adapter: Adapter) -> Sketch:
        """The sketch of any adapter, in the index or not.

        Raises
        ------
        FormatError
            A module holds NaN or Inf.
        """
        with single_blas_thread():
            return measure_adapter(adapter).sketch

    def exact_of(self, member: Member) -> ExactUpdate:
        """The update of a member for exact inner products, or a `ChangedFile`."""
        try:
            return ExactUpdate.of(self.adapter(member))
        except LoraLensError as error:  # it has changed, and may be anything now
            raise ChangedFile(member.name) from error

    def in_threads(self, tasks: Sequence[Task], work: Callable[[Task], Answer], left_out: str) -> dict[Task, Answer]:
        """Task → what ``work`` returns, in threads. Those with a `ChangedFile` are left out, and it is named."""
        changed: list[str] = []

        def answer(task: Task) -> Answer | None:
            try:
                return work(task)
            except ChangedFile as error:
                changed.append(str(error))
                return None

        with progress("reading", len(tasks)) as step:
            answers = in_threads(answer, tasks, processor_count(), step)
        self.warn_of_changed(changed, left_out)
        return {task: found for task, found in answers.items() if found is not None}

    def warn_of_changed(self, names: Sequence[str], left_out: str) -> None:
        """Warn of members whose files have changed; ``left_out`` says what became of them."""
        if names:
            warn(
                f"{count(len(names), 'file')} {left_out}, as they have changed since they were indexed: {min(names)}",
                fix=f"index the fleet again: {self.index_command}",
            )


class ChangedFile(Exception):  # noqa: N818 - it never reaches a user
    """The file of the member of this name has changed since it was indexed, or is gone."""
