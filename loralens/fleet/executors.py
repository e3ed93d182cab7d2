"""Measuring thousands of files on any executor, also if a file kills the process that measures it.

A chunk of files that kills a process is halved, until a single file is left.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import closing
from functools import partial

from loralens.core.processes import ProcessKilled, perform_in_processes
from loralens.fleet.measuring import MeasuredFile, measure_files

CHUNK = 32  # files that one task measures: enough to make the cost of a task small, few enough to stop soon
CHUNK_BYTES = 32 << 20  # bytes of such files, so that large files are spread over the workers
AHEAD = 3  # tasks at a time for each worker of an executor
REMOTE_AHEAD = 2048  # tasks at a time, in all, for an executor that does not say how many workers it has, such as Dask

Chunk = Sequence[str]


def measure_on_executor(
    executor: Executor, root: str, chunks: Sequence[Chunk], *, once: bool
) -> Iterator[list[MeasuredFile]]:
    """Measure chunks on any executor, and yield what is ready.

    Raises
    ------
    BrokenExecutor
        A process of the executor was killed, and it takes no more work.
    """
    workers = worker_count(executor)
    limit = workers * AHEAD if workers else REMOTE_AHEAD
    queue, pending = deque(chunks), dict[Future[list[MeasuredFile]], Chunk]()
    try:
        while queue or pending:
            while queue and len(pending) < limit:
                chunk = queue.popleft()
                pending[executor.submit(measure_files, root, list(chunk), once)] = chunk
            ready, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in ready:
                measured, smaller = _outcome(future, pending.pop(future))
                queue.extendleft(reversed(smaller))
                yield measured
    finally:
        for future in pending:
            future.cancel()


def worker_count(executor: Executor) -> int | None:
    """How many workers an executor of this machine has; None if it does not say, as that of Dask."""
    workers = getattr(executor, "_max_workers", None)
    return workers if isinstance(workers, int) else None


def measure_in_processes(
    workers: int, root: str, chunks: Sequence[Chunk], *, once: bool
) -> Iterator[list[MeasuredFile]]:
    """Measure chunks in processes of our own; a file that kills them gets a reason.

    Raises
    ------
    OptionError
        No process can be started.
    """
    work = partial(measure_files, root, once=once)
    with closing(perform_in_processes(chunks, work, workers)) as finished:
        for chunk, outcome in finished:
            if isinstance(outcome, ProcessKilled):
                measured, halves = _outcome_of_killer(chunk)
                yield measured
                yield from measure_in_processes(1, root, halves, once=once)
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                yield outcome


def _outcome(future: "Future[list[MeasuredFile]]", chunk: Chunk) -> tuple[list[MeasuredFile], list[Chunk]]:
    """What a task has measured, and the halves of its chunk that are to be tried again."""
    try:
        return future.result(), []
    except Exception as error:
        # Dask tries a task on other workers, and gives it up after some of them were killed. The error is recognised by
        # the name of its class, as Dask need not be installed.
        if type(error).__name__ != "KilledWorker":
            raise
    return _outcome_of_killer(chunk)


def _outcome_of_killer(chunk: Chunk) -> tuple[list[MeasuredFile], list[Chunk]]:
    """The halves of a chunk that kills the process that measures it, or the reason if it is a single file."""
    if len(chunk) > 1:
        half = len(chunk) // 2
        return [], [chunk[:half], chunk[half:]]
    reason = "the process that measured it was killed, each time that it was tried"
    fix = "it may need more memory than there is; if it does not, report this as a bug"
    return [MeasuredFile(chunk[0], "unreadable", reason, fix)], []


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
