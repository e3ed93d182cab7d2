"""Measuring thousands of files on any executor, also if a file kills the process that measures it.

A process pool breaks when one of its processes is killed, and does not say by which file. The chunks that were in work
then are measured one after the other in a new pool. A chunk that breaks it again is halved, until a single file is
left.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from typing import final

from loralens.errors import OptionError
from loralens.fleet.indexing.measuring import MeasuredFile, measure_files
from loralens.fleet.indexing.workers import check_processes_start, process_pool

CHUNK = 32  # files that one task measures: enough to make the cost of a task small, few enough to stop soon
CHUNK_BYTES = 32 << 20  # bytes of such files, so that large files are spread over the workers
AHEAD = 3  # tasks at a time for each worker of an executor
REMOTE_AHEAD = 2048  # tasks at a time, in all, for an executor that does not say how many workers it has, such as Dask

Chunk = Sequence[str]
KILLED = MeasuredFile(
    "",
    "unreadable",
    "the process that measured it was killed, each time that it was tried",
    "it may need more memory than there is; if it does not, report this as a bug",
)


@final
@dataclass
class Engine:
    """Measures chunks of files.

    Attributes
    ----------
    root : str
    once : bool
        How files are read.
    watch : callable, optional
        Receives the files that are in work at a time, so that a later run knows which ones may have killed this one.
    """

    root: str
    once: bool = False
    watch: Callable[[Sequence[str]], None] | None = None

    def submit(self, executor: Executor, chunk: Chunk) -> "Future[list[MeasuredFile]]":
        """Give a chunk to an executor."""
        return executor.submit(measure_files, self.root, list(chunk), self.once)

    def on_executor(self, executor: Executor, chunks: Sequence[Chunk]) -> Iterator[list[MeasuredFile]]:
        """Measure chunks on any executor, and yield what is ready.

        Raises
        ------
        BrokenExecutor
            A process of the executor was killed, and it takes no more work.
        """
        workers = getattr(executor, "_max_workers", None)
        limit = workers * AHEAD if isinstance(workers, int) else REMOTE_AHEAD
        queue, pending = deque(chunks), dict[Future[list[MeasuredFile]], Chunk]()
        try:
            while queue or pending:
                coming = [queue.popleft() for _ in range(min(limit - len(pending), len(queue)))]
                # The files are noted before they are begun, since the first one may kill this process at once. What is
                # done meanwhile may stay among them.
                if self.watch and coming and isinstance(workers, int):
                    self.watch([file for chunk in (*pending.values(), *coming) for file in chunk])
                for chunk in coming:
                    pending[self.submit(executor, chunk)] = chunk
                ready, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in ready:
                    chunk = pending[future]
                    measured, smaller = _outcome(future, chunk)
                    # The chunk is taken off only now: if the executor is broken, it stays among the unfinished ones.
                    del pending[future]
                    queue.extendleft(reversed(smaller))
                    yield measured
        finally:
            for future in pending:
                future.cancel()

    def in_processes(self, workers: int, chunks: Sequence[Chunk]) -> Iterator[list[MeasuredFile]]:
        """Measure chunks in processes of our own; a file that kills them gets a reason.

        Raises
        ------
        OptionError
            No process can be started.
        """
        unfinished = {file: None for chunk in chunks for file in chunk}
        try:
            with process_pool(min(workers, len(chunks))) as pool:
                check_processes_start(pool)
                try:
                    for measured in self.on_executor(pool, chunks):
                        for measured_file in measured:
                            del unfinished[measured_file.path]
                        yield measured
                finally:
                    pool.shutdown(cancel_futures=True)
        except BrokenExecutor:
            for chunk in chunks:
                if suspects := [file for file in chunk if file in unfinished]:
                    yield from self._one_after_the_other(suspects)

    def _one_after_the_other(self, chunk: Chunk) -> Iterator[list[MeasuredFile]]:
        """Measure a chunk alone in a new process, and its halves if it kills this process."""
        if self.watch:
            self.watch(chunk)
        try:
            with process_pool(1) as pool:
                check_processes_start(pool)
                measured = self.submit(pool, chunk).result()
        except BrokenExecutor:
            if len(chunk) == 1:
                yield [_outcome_of_killer(chunk[0])]
                return
            half = len(chunk) // 2
            yield from self._one_after_the_other(chunk[:half])
            yield from self._one_after_the_other(chunk[half:])
        else:
            yield measured


def _outcome_of_killer(file: str) -> MeasuredFile:
    """The outcome of a file that kills the process that measures it."""
    return MeasuredFile(file, KILLED.status, KILLED.reason, KILLED.fix)


def _outcome(future: "Future[list[MeasuredFile]]", chunk: Chunk) -> tuple[list[MeasuredFile], list[Chunk]]:
    """What a task has measured, and the halves of its chunk that are to be tried again."""
    try:
        return future.result(), []
    except Exception as error:
        # Dask tries a task on other workers, and gives it up after some of them were killed. The error is recognised by
        # the name of its class, as Dask need not be installed.
        if type(error).__name__ != "KilledWorker":
            raise
    if len(chunk) == 1:
        return [_outcome_of_killer(chunk[0])], []
    half = len(chunk) // 2
    return [], [chunk[:half], chunk[half:]]


def make_chunks(sizes: Sequence[tuple[str, int]], workers: int) -> list[Chunk]:
    """Files with their sizes → chunks of at most `CHUNK` files and about `CHUNK_BYTES` bytes, in the same order.

    Few files make smaller chunks, so that the workers end at about the same time.
    """
    most = min(CHUNK, -(-len(sizes) // (workers * AHEAD)))
    chunks: list[list[str]] = [[]]
    filled = 0
    for file, size in sizes:
        if chunks[-1] and (len(chunks[-1]) >= most or filled + size > CHUNK_BYTES):
            chunks.append([])
            filled = 0
        chunks[-1].append(file)
        filled += size
    return [chunk for chunk in chunks if chunk]


def broken_executor(error: BrokenExecutor) -> OptionError:
    """The error after a process of the caller's executor was killed."""
    refused = OptionError(
        "a process of the executor was killed, and the executor takes no more work",
        fix="call update again, with a new executor: what was measured is kept, and a file that kills gets a reason",
    )
    refused.__cause__ = error
    return refused
