"""The verb ``fleet``: `Fleet` with its questions, and what makes, updates and opens indexes for the command line."""

from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from os import PathLike
from pathlib import Path
from typing import Any, final

from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.messages import command_line, note
from loralens.errors import OptionError
from loralens.fleet.catalogue import FOLDER
from loralens.fleet.copies import find_copies
from loralens.fleet.fleet_index import FleetIndex
from loralens.fleet.groups import find_families, find_runs
from loralens.fleet.likeness import FAMILY
from loralens.fleet.member_bases import find_bases
from loralens.fleet.near import find_near
from loralens.fleet.updating import update_index
from loralens.requirements import missing_packages
from loralens.verbs.fleets.group_answers import (
    BasesResult,
    CopiesResult,
    FamiliesResult,
    FamilyWordsResult,
    NearResult,
    RunsResult,
)
from loralens.verbs.fleets.index_answers import (
    EmptyResult,
    RowsResult,
    StatsResult,
    UpdateResult,
    count_members,
    is_empty,
    select_rows,
)
from loralens.verbs.models.models import ModelSource
from loralens.verbs.shared.adapters import as_source
from loralens.verbs.shared.options import check_counts


@final
class Fleet(FleetIndex):
    """The index of a collection of adapters, which answers questions about them.

    Attributes
    ----------
    home : Path
        The folder of the index.

    Notes
    -----
    Answers are about the last complete state of the index. Another process may update it at any time.
    """

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
    ) -> UpdateResult:
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
            ``root`` is not a folder, or is empty although the index has adapters of it; or another process updates the
            index.
        FormatError
            The disk cannot be written.
        """
        folder = None if root is None else Path(root)
        return UpdateResult.of(self.home, *update_index(self.home, folder, executor, jobs=jobs, once=once))

    def near(
        self, adapter: Adapter | str | PathLike[str], k: int = 10, *, sketch: bool = False, exact: bool = False
    ) -> NearResult:
        """The members whose updates have the largest cosines with that of an adapter.

        Sketches propose members, and exact inner products order them.

        Parameters
        ----------
        adapter : Adapter, path or str
            An adapter, a path, or the name of a member. A member is not compared with itself.
        k : int
            How many neighbours to return.
        sketch : bool
            Compare sketches only, and read no file of the fleet.
        exact : bool
            Compare every member exactly that has a module of the example, instead of those that sketches propose.

        Raises
        ------
        OptionError
            Both ``sketch`` and ``exact``; or ``k`` is below 1.
        FormatError
            The example cannot be read, or is a member whose file has changed since it was indexed.
        """
        return NearResult(*find_near(self, as_source(adapter), k, sketch=sketch, exact=exact))

    def copies(self) -> CopiesResult:
        """The members that are the same update as another, and the files that can be deleted without a loss."""
        return CopiesResult(*find_copies(self), self.command("copies", "--paths"))

    def runs(self, *, sketch: bool = False) -> RunsResult:
        """Groups of members that began from the same random A: checkpoints of a run, and runs with one seed.

        Two members began from the same A if the cosine of their start sketches is at least 0.5. Groups are the
        connected components of such pairs: training moves A, so the first and the last checkpoint of a long run may
        have less. Updates with a cosine of at least 0.995 by sketches and norms within 1 % are in one group too.

        Parameters
        ----------
        sketch : bool
            State the cosine of every group by sketches, and read no file.
        """
        return RunsResult(*find_runs(self, sketch=sketch), self.command("runs", "--csv"))

    def families(self, at: float = FAMILY, *, sketch: bool = False) -> FamiliesResult:
        """Groups of members whose updates are alike: average linkage of cosines by sketches, cut at a level.

        Where the error of sketches could carry the mean cosine of a family of up to 32 members below the level, the
        family is grouped again by exact cosines.

        Parameters
        ----------
        at : float
            The smallest mean cosine within a family: 0.5 by default; 0.2 finds similar adapters.
        sketch : bool
            Decide and state everything by sketches, and read no file.

        Raises
        ------
        OptionError
            ``at`` is not between 0.1 and 1.
        """
        level = [] if at == FAMILY else ["--at", f"{at:g}"]
        return FamiliesResult(at, *find_families(self, at, sketch=sketch), self.command("families", *level, "--csv"))

    def explain(
        self,
        base: ModelSource,
        *,
        at: float = FAMILY,
        forward: bool = False,
        limit: int = 16,
        device: str = "auto",
        dtype: FloatType = "f32",
        threads: int | None = None,
    ) -> FamilyWordsResult:
        """The words that set the families apart from each other, on a base model that is loaded.

        Of every family that fits the base, the three adapters nearest to its middle are averaged, and the mean of the
        other families is subtracted. An adapter that is in no family stands for itself. The measures are those of
        `loralens.explain`, and words are listed only if they exceed those of random updates with the same spectra.

        Parameters
        ----------
        base : path or (model, tokenizer)
            As for `loralens.explain`.
        at : float
            The smallest mean cosine within a family.
        forward : bool
            Run the model on neutral texts, instead of reading the weights alone.
        limit : int
            How many families and single adapters are read, the largest families first.
        device, dtype, threads
            As for `loralens.explain`.

        Raises
        ------
        OptionError
            ``at`` is not between 0.1 and 1; ``limit`` is below 1; torch is not installed.
        FormatError
            The base cannot be loaded.
        MismatchError
            The base predicts no tokens.
        """
        from loralens.verbs.fleets.family_words import explain_families  # imports what runs models

        check_counts(limit=limit, threads=threads)
        families, alone, _ = find_families(self, at)
        return explain_families(
            self, families, alone, base, forward=forward, limit=limit, device=device, dtype=dtype, threads=threads
        )

    def bases(self) -> BasesResult:
        """The base models of the members: those that they name, those that they show, and contradictions."""
        return BasesResult(*find_bases(self), self.command("bases", "--csv"))

    def empty(self) -> EmptyResult:
        """The members with modules whose ΔW is 0, those first that change no weight at all."""
        members = self.members()
        with_zeros = [member for member in members if member.zero_modules]
        return EmptyResult(self.root, sorted(with_zeros, key=lambda member: not is_empty(member)), len(members))

    def stats(self) -> StatsResult:
        """The fleet in numbers: sizes, ranks, dialects."""
        command = self.command("stats", last="--above")
        return count_members(self.root, self.home, self.members(), len(self.unreadable()), command)

    def rows(self, sql: str) -> RowsResult:
        """The answer of the catalogue to one SELECT.

        The tables are ``adapters``, ``unreadable``, ``files`` (both, and files without LoRA pairs), ``signatures`` and
        ``sketches``. The catalogue is opened for reading only, and an answer may take 30 seconds and 256 MiB at most.

        Raises
        ------
        OptionError
            It is not one valid SELECT, or exceeds these limits.
        """
        return select_rows(self.home, sql)


def index_fleet(
    folder: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    jobs: int | None = None,
    dask: str | None = None,
    once: bool = False,
) -> UpdateResult:
    """Make or update the index of the adapters under a folder.

    Parameters
    ----------
    folder : path
        The folder of the adapters.
    output : path, optional
        The folder of the index; by default ``.loralens-fleet`` in ``folder``.
    jobs : int, optional
        Measure the files in this many processes; by default one for each processor if there are many files, and in
        threads of this one otherwise.
    dask : str, optional
        The address of a Dask scheduler, whose workers measure the files. They need the same disk.
    once : bool
        As in `loralens.load`.

    Raises
    ------
    OptionError
        ``folder`` is not a folder, another process updates the index, or there is no scheduler at the address.
    """
    home = Fleet.open(folder if output is None else output).home
    with _dask_executor(dask) as executor:
        updated = update_index(home, Path(folder), executor, jobs=jobs, once=once, spawning=True)
    return UpdateResult.of(home, *updated)


@contextmanager
def _dask_executor(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask scheduler; None without an address.

    Raises
    ------
    OptionError
        There is no scheduler at the address, or it ends while it is used.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
        from distributed.comm import CommClosedError
    except ImportError as error:
        raise missing_packages("--dask", ["distributed"], error) from error
    try:
        client: Any = Client(address)  # type: ignore[no-untyped-call, unused-ignore]
    except (OSError, ValueError) as error:
        what = f"there is no Dask scheduler at {address}"
        raise OptionError(what, fix="give the address that it prints at its start: tcp://HOST:PORT") from error
    # They would log tracebacks of a lost connection, which is one message here.
    loggers = [getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(CRITICAL)
    try:
        with client:
            yield client.get_executor(pure=False)
    # The tasks are cancelled when the connection is lost.
    except (CancelledError, CommClosedError) as error:
        raise OptionError(
            f"the Dask scheduler at {address} has ended, or cannot be reached any more",
            fix="start it again and repeat the command; fleet index keeps what was measured",
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def open_fleet(home: str | PathLike[str]) -> Fleet:
    """Open an index for a question, and note whether the files have changed since it was made.

    Raises
    ------
    OptionError
        There is no index, or another version made it.
    FormatError
        It is damaged.
    """
    fleet = Fleet.open(home)
    changes = fleet.changes()
    if changes:
        counts = ", ".join(f"{number} {kind}" for kind, number in changes.items())
        note(f"{fleet.home}: the files have changed since they were indexed: {counts}", fix=fleet.index_command)
    return fleet
