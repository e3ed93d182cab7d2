"""`compress_fleet`: writes all adapters of a fleet to one file, and measures every error on that file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from functools import lru_cache
from pathlib import Path
from typing import final

import numpy as np

from loralens.compression.loss import losses, total_error
from loralens.core.lazy import Array, LazyArray
from loralens.core.progress import Step, progress
from loralens.core.threads import processor_count
from loralens.errors import FormatError, OptionError
from loralens.fleet.joint.code_group import CodedTask, FleetSource, code_group
from loralens.fleet.joint.result import CompressedAdapter, CompressionResult, Refused
from loralens.formats.records.fleets.about import about_stored
from loralens.formats.records.fleets.reader import FleetFile
from loralens.formats.records.fleets.writer import FleetEntry, GroupEntry, check_fleet_target, write_fleet
from loralens.formats.records.undo import Spool

# The worker and the measurement of the written file compute the error in two ways, which agree to rounding.
AGREE = 1e-6
AHEAD = 2  # tasks that wait for each worker of an executor, so that none is idle and few results are in memory
OPEN = 8  # sources whose headers stay in memory while their extras are copied


def compress_fleet(
    groups: Sequence[Sequence[FleetSource]],
    output: Path,
    *,
    error: float = 0.15,
    executor: Executor | None = None,
    overwrite: bool = False,
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

    Raises
    ------
    OptionError
        The error is not between 0 and 1, there is no adapter, or the target exists.
    FormatError
        A worker was killed, a source changed meanwhile, or the disk cannot be written. Nothing was written then.
    """
    if not 0 < error < 1:
        raise OptionError(f"the error {error:g} is not between 0 and 1", fix="give a share of ‖ΔW‖, such as 0.15")
    check_fleet_target(output, overwrite=overwrite)
    sources = {source.name: source for group in groups for source in group}
    with Spool(output.absolute().parent) as spool:
        collected = _Collected(sources, spool)
        with progress("compressing", len(sources)) as step:
            for number, task in _results(groups, error, executor):
                collected.add(task)
                if step:
                    step(len(groups[number]))
        if not collected.entries:
            refused = next(iter(collected.refused.items()), None)
            what = "no adapter could be compressed" if refused else "there is no adapter to compress"
            raise OptionError(what, fix=f"{refused[0]}: {refused[1]}" if refused else "give a fleet that has some")
        # In the order of their names, so that the file does not depend on the order in which tasks end.
        ordered = {name: collected.entries[name] for name in sorted(collected.entries)}
        rows: list[CompressedAdapter] = []

        def check(part: Path) -> None:
            with progress("measuring", len(ordered)) as step:
                rows.extend(_measure(FleetFile(part), sources, step))

        write_fleet(output, ordered, collected.groups, error=error, check=check)
    return _result(output, error, rows, collected, sources)


@final
class _Collected:
    """What the tasks have given so far; their bytes are in a temporary file."""

    def __init__(self, sources: Mapping[str, FleetSource], spool: Spool) -> None:
        self.sources, self.spool = sources, spool
        self.entries: dict[str, FleetEntry] = {}
        self.groups: list[GroupEntry] = []
        self.refused: dict[str, str] = {}
        self._load = lru_cache(OPEN)(lambda name: sources[name].load())
        self._stored = lru_cache(OPEN)(lambda name: about_stored(self._load(name))[1])

    def add(self, task: CodedTask) -> None:
        """Take over the result of a task."""
        first = len(self.groups)
        for group in task.groups:
            out, in_, widths = (self.spool.keep(part.tobytes()) for part in group.parts)
            self.groups.append(GroupEntry(group.shapes, (out, in_, widths)))
        for name, source in task.sources.items():
            numbers = source.numbers
            self.entries[name] = FleetEntry(
                source.kind, source.error, source.pair_bytes, source.about,
                self.spool.keep(numbers.tobytes()) if isinstance(numbers, np.ndarray) else numbers,
                None if source.group is None else first + source.group,
                {
                    digest: self._extra(name, digest if numbers is None else key, stored=numbers is None)
                    for digest, key in source.extras.items()
                },
            )  # fmt: skip
        self.refused |= task.refused

    def _extra(self, name: str, key: str, *, stored: bool) -> LazyArray:
        """A tensor of a source that is copied as it is. The file is opened when it is needed, not kept open."""

        def tensor() -> LazyArray:
            found: LazyArray = self._stored(name)[key] if stored else self._load(name).extra[key].tensor
            return found

        def rows(start: int, stop: int) -> Array:
            return tensor().rows(start, stop).read()

        shape, dtype = tensor().shape, tensor().dtype
        return LazyArray(lambda: tensor().read(), shape=shape, dtype=dtype, rows=rows if shape else None)


def _results(
    groups: Sequence[Sequence[FleetSource]], error: float, executor: Executor | None
) -> Iterator[tuple[int, CodedTask]]:
    """The results of all tasks with their numbers, as they end."""
    if executor is None:
        for number, group in enumerate(groups):
            yield number, code_group(group, error)
        return
    waiting: dict[Future[CodedTask], int] = {}
    numbers = iter(range(len(groups)))
    workers = getattr(executor, "_max_workers", None) or processor_count()
    try:
        while True:
            for number in numbers:
                waiting[executor.submit(code_group, groups[number], error)] = number
                if len(waiting) >= AHEAD * workers:
                    break
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield waiting.pop(future), future.result()
    except BrokenExecutor as broken:
        raise FormatError(
            "a worker was killed while it compressed adapters; nothing was written",
            fix="run it again, with fewer jobs if the memory was too small",
        ) from broken
    finally:
        for future in waiting:
            future.cancel()


def _measure(file: FleetFile, sources: Mapping[str, FleetSource], step: Step | None) -> Iterable[CompressedAdapter]:
    """Read every adapter back from the file, and compare it with its source."""
    for name, entry in file.contents.adapters.items():
        before = sources[name].load()
        after = file.adapter(name)
        measured = total_error(losses(before, after, threads=processor_count()))
        if not abs(measured - entry.error) <= AGREE:
            raise FormatError(
                f"{name}: its error in the file is {measured:.6f}, and was {entry.error:.6f} when it was compressed",
                fix="begin again when nothing else writes to the adapter",
            )
        for key, extra in before.extra.items():
            if key not in after.extra or after.extra[key].tensor.shape != extra.tensor.shape:
                raise FormatError(f"{name}: {key} is missing in the file", fix="report this as a bug")
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
