"""`compress_fleet`: writes all adapters of a fleet to one file, and measures every error on that file."""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np

from loralens.compression.loss import losses, total_error
from loralens.core.lazy import Array, LazyArray
from loralens.core.progress import Step, progress
from loralens.core.threads import processor_count
from loralens.errors import FormatError, OptionError, place
from loralens.fleet.indexing.workers import check_processes_start, process_pool
from loralens.fleet.joint.code_group import CodedTask, FleetSource, code_group
from loralens.fleet.joint.result import CompressedAdapter, CompressionResult, Refused
from loralens.formats.files.apart import check_apart
from loralens.formats.files.atomic import check_not_written
from loralens.formats.files.json_text import is_safe_text
from loralens.formats.files.relative_name import is_relative_name
from loralens.formats.records.fleets.about import about_stored
from loralens.formats.records.fleets.contents import content_digest
from loralens.formats.records.fleets.reader import FleetFile
from loralens.formats.records.fleets.writer import FleetEntry, GroupEntry, check_fleet_target, write_fleet
from loralens.formats.records.undo import Spool

# The worker and the measurement of the written file compute the error in two ways, which agree to rounding.
AGREE = 1e-6
AHEAD = 2  # tasks for each worker of an executor, so that none is idle and few results are in memory
REMOTE_AHEAD = 256  # tasks at a time for an executor that does not say how many workers it has, such as Dask
AGAIN = "begin again when nothing else writes to the adapter"
UNNAMED = "its name is not a path of plain parts on every system: rename its folder"
UNPRINTABLE = "its name is not UTF-8, or has characters that a terminal does not show: rename its folder"
OPEN = 8  # sources whose headers stay in memory while their extras are copied

Place = tuple[int, int]  # the number of a task, and of a group within it
NOWHERE: Place = (-1, -1)  # of adapters without a group


def compress_fleet(
    groups: Sequence[Sequence[FleetSource]],
    output: Path,
    *,
    error: float = 0.15,
    executor: Executor | None = None,
    jobs: int | None = None,
    overwrite: bool = False,
    unreadable: Mapping[str, str] | None = None,
) -> CompressionResult:
    """Write adapters to one file, each with at most this error, in as few bytes as possible.

    Parameters
    ----------
    groups : sequence of sequence of FleetSource
        Adapters that may share bases; each group is one task. Copies are in the group of their original.
    output : Path
        A ``.safetensors`` file, which appears complete or not at all.
    error : float
        The largest ‖ΔW − ΔW'‖/‖ΔW‖ of an adapter, over all its modules.
    executor : Executor, optional
        Where the tasks run; by default in this process, one group at a time.
    jobs : int, optional
        Without an executor, run the tasks in this many processes.
    overwrite : bool
        Replace what is there.
    unreadable : mapping of str to str, optional
        Names of files that cannot be read, with the reasons; the result lists them among those that are left out.

    Raises
    ------
    OptionError
        The error is not between 0 and 1, there is no adapter, or the target exists or is one of the adapters.
    FormatError
        A worker was killed, a source changed meanwhile, or the disk cannot be written. Nothing was written then.
    """
    if not 0 < error < 1:
        raise OptionError(f"the error {error:g} is not between 0 and 1", fix="give a share of ‖ΔW‖, such as 0.15")
    check_fleet_target(output, overwrite=overwrite)
    names = [source.name for group in groups for source in group]
    refused = {name: UNNAMED for name in names if not is_relative_name(name)}
    # A reader of the file would refuse all of it.
    refused |= {name: UNPRINTABLE for name in names if not is_safe_text(name)}
    groups = [[source for source in group if source.name not in refused] for group in groups]
    sources = {source.name: source for group in groups for source in group}
    check_apart(output, [(f"the adapter {source.name}", Path(source.path)) for source in sources.values()])
    with Spool(output.absolute().parent) as spool:
        collected = _Collected(sources, spool, output, {**(unreadable or {}), **refused})
        with progress("compressing", len(sources)) as step:
            for number, task in _results(groups, error, executor, jobs):
                collected.add(number, task)
                if step:
                    step(len(groups[number]))
        entries, group_entries = collected.in_order()
        if not entries:
            first = next(iter(collected.refused.items()), None)
            what = "no adapter could be compressed" if first else "there is no adapter to compress"
            raise OptionError(what, fix=": ".join(first) if first else "give a fleet that has some")
        rows: list[CompressedAdapter] = []

        def check(part: Path) -> None:
            with progress("measuring", len(entries)) as step:
                rows.extend(_measure(FleetFile(part), sources, step))
            check_not_written(output, overwrite=overwrite)

        write_fleet(output, entries, group_entries, error=error, check=check)
    return _result(output, error, rows, collected, sources)


@final
class _Collected:
    """What the tasks have given so far; their bytes are in a temporary file."""

    def __init__(
        self, sources: Mapping[str, FleetSource], spool: Spool, output: Path, refused: Mapping[str, str]
    ) -> None:
        self._spool, self._output = spool, output
        self.refused = dict(refused)
        self._entries: dict[str, FleetEntry] = {}
        self._groups: dict[Place, GroupEntry] = {}
        self._group_of: dict[str, Place] = {}
        self._load = lru_cache(OPEN)(lambda name: sources[name].load())
        self._stored = lru_cache(OPEN)(lambda name: about_stored(self._load(name))[1])

    def add(self, number: int, task: CodedTask) -> None:
        """Take over the result of the task of that number."""
        for local, group in enumerate(task.groups):
            out, in_, widths = (self._keep(part.tobytes()) for part in group.parts)
            self._groups[number, local] = GroupEntry(group.shapes, (out, in_, widths))
        for name, source in task.sources.items():
            numbers, stored = source.numbers, source.numbers is None
            self._entries[name] = FleetEntry(
                source.kind,
                source.error,
                source.pair_bytes,
                source.about,
                self._keep(numbers.tobytes()) if isinstance(numbers, np.ndarray) else numbers,
                extras={
                    digest: self._extra(name, digest if stored else key, stored=stored)
                    for digest, key in source.extras.items()
                },
            )
            if source.group is not None:
                self._group_of[name] = number, source.group
        self.refused |= task.refused

    def _keep(self, data: bytes) -> LazyArray:
        """The bytes, from the temporary file; an error of the disk names what is to be written."""
        with place(self._output):
            return self._spool.keep(data)

    def in_order(self) -> tuple[dict[str, FleetEntry], list[GroupEntry]]:
        """The adapters by name and the groups by task, so that the file does not depend on which task ends first."""
        order = {place: i for i, place in enumerate(sorted(self._groups))}
        entries = {
            name: replace(self._entries[name], group=order.get(self._group_of.get(name, NOWHERE)))
            for name in sorted(self._entries)
        }
        return entries, [self._groups[place] for place in order]

    def _extra(self, name: str, key: str, *, stored: bool) -> LazyArray:
        """A tensor of a source that is copied as it is. The file is opened when it is needed, not kept open."""

        def tensor() -> LazyArray:
            extra: LazyArray = self._stored(name)[key] if stored else self._load(name).extra[key].tensor
            return extra

        def rows(start: int, stop: int) -> Array:
            return tensor().rows(start, stop).read()

        shape, dtype = tensor().shape, tensor().dtype
        return LazyArray(lambda: tensor().read(), shape=shape, dtype=dtype, rows=rows if shape else None)


def _results(
    groups: Sequence[Sequence[FleetSource]], error: float, executor: Executor | None, jobs: int | None
) -> Iterator[tuple[int, CodedTask]]:
    """The results of all tasks with their numbers, as they end."""
    if executor is not None:
        yield from _on_executor(groups, error, executor)
    elif jobs is not None and jobs > 1:
        with process_pool(min(jobs, len(groups) or 1)) as pool:
            check_processes_start(pool)
            yield from _on_executor(groups, error, pool)
    else:
        for number, group in enumerate(groups):
            yield number, code_group(group, error)


def _on_executor(
    groups: Sequence[Sequence[FleetSource]], error: float, executor: Executor
) -> Iterator[tuple[int, CodedTask]]:
    waiting: dict[Future[CodedTask], int] = {}
    workers = getattr(executor, "_max_workers", None)
    limit = AHEAD * workers if isinstance(workers, int) else REMOTE_AHEAD
    # Large groups come first, so that none of them is left for the end.
    numbers = deque(sorted(range(len(groups)), key=lambda number: -len(groups[number])))
    try:
        while numbers or waiting:
            while numbers and len(waiting) < limit:
                number = numbers.popleft()
                waiting[executor.submit(code_group, groups[number], error)] = number
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                yield number, _outcome(future, groups[number])
    except BrokenExecutor as broken:
        raise FormatError(
            "a worker was killed while it compressed adapters; nothing was written",
            fix="run it again, with fewer jobs if the memory was too small",
        ) from broken
    finally:
        for future in waiting:
            future.cancel()


def _outcome(future: "Future[CodedTask]", group: Sequence[FleetSource]) -> CodedTask:
    try:
        return future.result()
    except Exception as error:
        # Dask tries a task on other workers, and gives it up after some of them were killed. The error is recognised by
        # the name of its class, as Dask need not be installed.
        if type(error).__name__ != "KilledWorker":
            raise
        raise FormatError(
            f"the workers that compressed {group[0].name} and {len(group) - 1} others were killed; nothing was written",
            fix="give the workers more memory",
        ) from error


def _measure(file: FleetFile, sources: Mapping[str, FleetSource], step: Step | None) -> Iterable[CompressedAdapter]:
    """Read every adapter back from the file, and compare it with its source."""
    for name, entry in file.contents.adapters.items():
        before = sources[name].load()
        after = file.adapter(name)
        with place(name):
            measured = total_error(losses(before, after, threads=processor_count()))
        if not abs(measured - entry.error) <= AGREE:
            raise FormatError(
                f"{name}: its error in the file is {measured:.6f}, and was {entry.error:.6f} when it was compressed",
                fix=AGAIN,
            )
        for key, extra in before.extra.items():
            # Extras are read from the source once more while the file is written.
            if content_digest(after.extra[key].tensor) != content_digest(extra.tensor):
                raise FormatError(f"{name}: {key} was changed while it was read", fix=AGAIN)
        ranks = [module.rank for module in before.modules.values()]
        yield CompressedAdapter(
            name, entry.kind, measured, max(ranks), entry.pair_bytes, file.own_bytes(name), entry.group
        )
        if step:
            step(1)


def _result(
    output: Path,
    error: float,
    rows: Sequence[CompressedAdapter],
    collected: _Collected,
    sources: Mapping[str, FleetSource],
) -> CompressionResult:
    file = FleetFile(output)
    written = {row.name for row in rows}
    before = sum(_file_bytes(Path(source.path)) for name, source in sources.items() if name in written)
    refused = [Refused(name, reason) for name, reason in collected.refused.items()]
    bases = [file.group_bytes(group) for group in range(len(file.contents.groups))]
    return CompressionResult(output, error, rows, refused, bases, before, file.size)


def _file_bytes(path: Path) -> int:
    from loralens.formats.files.location import adapter_file

    return adapter_file(path).stat().st_size
