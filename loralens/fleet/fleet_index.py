"""`FleetIndex`: the index of a collection of adapters, as questions read it."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, TypeVar, final

import numpy as np
from numpy.typing import NDArray

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
    damaged,
    find_home,
    index_command,
    read_norms,
    read_state,
    to_signature,
)
from loralens.fleet.likeness import ExactUpdate, ModuleKey
from loralens.fleet.measuring import measure_adapter
from loralens.fleet.sketches import Sketch, Sketches, module_keys
from loralens.fleet.updating import count_changes, real_of, stamp_of
from loralens.formats import load
from loralens.formats.files.location import find_adapter
from loralens.tables.numbers import count

SIMILAR = 3  # names that are shown if no member has a name
LOOKED_AT = 10_000  # most names that are compared with a misspelt one; they take a second
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
    def state(self) -> FleetState:
        """The last complete state. An update replaces the catalogue as a whole, so that the file itself says which."""
        try:
            status = (self.home / CATALOGUE).lstat()
            file = status.st_ino, status.st_mtime_ns, status.st_size
        except OSError:  # the reading says why
            file = 0, 0, 0
        if self._state is None or file != self._file:
            self._state, self._file, self._signatures = read_state(self.home), file, {}
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
        digest = member.signature
        if digest not in self._signatures:
            text = self.state.signatures.get(digest)
            if text is None:
                what = f"{self.home}: the signature {digest} is missing"
                raise FormatError(what, fix=f"index again: {index_command(self.home)}")
            try:
                self._signatures[digest] = to_signature(text)
            except ValueError as error:
                raise damaged(self.home) from error
        return self._signatures[digest]

    def lookup(self, members: Sequence[Member]) -> "MemberLookup":
        """The members of a `snapshot` by name, file and modules; made once for each state."""
        if self._lookup is None or self._lookup.members is not members:
            self._lookup = MemberLookup(members)
        return self._lookup

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

    def exact(self, adapter: Adapter) -> ExactUpdate:
        """The update of an adapter for exact inner products."""
        return ExactUpdate.of(adapter, self.modules(adapter))

    def exact_of(self, member: Member) -> ExactUpdate:
        """The same of a member, or a `ChangedFile`."""
        try:
            return self.exact(self.adapter(member))
        except LoraLensError as error:  # it has changed, and may be anything now
            raise ChangedFile(member.name) from error

    def in_threads(
        self, tasks: Sequence[Task], work: Callable[[Task], Answer], left_out: str, *, doing: str = "reading"
    ) -> dict[Task, Answer]:
        """Task → what ``work`` returns, in threads. Those with a `ChangedFile` are left out, and it is named."""
        changed: list[str] = []

        def answer(task: Task) -> Answer | None:
            try:
                return work(task)
            except ChangedFile as error:
                changed.append(error.name)
                return None

        with progress(doing, len(tasks)) as step:
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

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@final
class MemberLookup:
    """The members of one state of an index by name, file and signature, in arrays that are made once.

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
                path = find_adapter(path).file
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

    def sharing(self, index: FleetIndex, modules: frozenset[ModuleKey]) -> NDArray[np.bool_]:
        """Whether each member has one of these modules, by name and shape."""
        shares = []
        for row in self._of_signature.tolist():
            # Few signatures occur in a fleet, and each is looked at once.
            signature = index.signature(self.members[row])
            shares.append(not modules.isdisjoint(zip(signature.keys, signature.shapes, strict=True)))
        return np.asarray(np.array(shares)[self._signatures], dtype=np.bool_)


def _numbers_of(words: Sequence[str]) -> NDArray[Any]:
    """The words as numbers, equal for equal words."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
