"""Making a changed copy of a model: the checks before it, the files beside the weights, and the threads that write.

What is written where is decided for each container: `loralens.formats.models.model_writer` for safetensors, and
`loralens.formats.models.gguf_writer` for GGUF.
"""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple, final

import numpy as np

from loralens.core.lazy import Array
from loralens.errors import place
from loralens.formats.files.apart import Input
from loralens.formats.files.atomic import atomic_path, check_write_target
from loralens.formats.files.disk import disk_errors, write_at
from loralens.formats.files.leftovers import tidy
from loralens.formats.files.relative_name import path_to_write
from loralens.formats.models.model_files import ModelFiles
from loralens.formats.records.merged import check_replaceable

HURRY = 1 << 24  # bytes after which the disk is told to write, which shortens the wait at the end from 0.35 to 0.07 s

Fill = Callable[[str], Iterator[Array]]  # the rows of one tensor of the copy, in order
Watch = Callable[[str, Array], None]
Step = Callable[[int], None]


@final
@dataclass(frozen=True, slots=True)
class CopyTarget:
    """The place of a copy, and what it takes over from the model.

    Attributes
    ----------
    path : Path
        A folder, or a file if the model is a file. It appears complete or not at all.
    texts : mapping of str to str
        New contents of other files of the folder.
    without : collection of str
        Other files that are not copied.
    names : mapping of str to str
        Other files that are copied under a new name.
    inputs : collection of (str, Path)
        Everything that is read, each with a description and its path; the model itself is the first. The target must
        not overlap with any of them.
    overwrite : bool
        Let the copy replace an existing target, by two renames. At every moment, the old or the new one is complete.
    """

    path: Path
    texts: Mapping[str, str]
    without: Collection[str]
    names: Mapping[str, str]
    inputs: Collection[Input]
    overwrite: bool


@contextmanager
def new_copy(files: ModelFiles, target: CopyTarget) -> Iterator[Path]:
    """Yield the path of the unfinished copy, which has all but the weights. After the block it becomes the target.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error.
    """
    path, folder = target.path, files.root.is_dir()
    companions = {name: target.names.get(name, name) for name in files.companions if name not in target.without}
    with place(path), disk_errors():
        tidy(path)
        known_inputs = target.inputs or [("the base", files.root)]
        check_write_target(path, known_inputs, folder=folder, overwrite=target.overwrite)
        # Unrelated files in the folder would be lost, so they are refused even with `overwrite`.
        if path.is_dir():
            weights = {*(shard.name for shard in files.shards), *(index.name for index in files.indices)}
            check_replaceable(path, weights | {*companions.values()})
    with atomic_path(path, folder=folder, overwrite=target.overwrite) as part:
        if folder:
            _copy_others(files, part, companions)
            for name, text in target.texts.items():
                write_text(path_to_write(part, name), text)
        yield part


def _copy_others(files: ModelFiles, part: Path, names: Mapping[str, str]) -> None:
    """Copy all files other than weights under their new names; links are followed."""
    # Also the folders of shards, whose files are made later.
    for name in (*names.values(), *(shard.name for shard in files.shards)):
        path_to_write(part, name).parent.mkdir(parents=True, exist_ok=True)
    # copyfile follows links, so that the copy does not depend on a cache.
    for name, new in names.items():
        shutil.copyfile(files.root / name, path_to_write(part, new))


def write_text(path: Path, text: str) -> None:
    """Write a text with the line endings that it has."""
    path.write_text(text, encoding="utf-8", newline="")


class WriteJob(NamedTuple):
    """One tensor that is written at a position of a file.

    Attributes
    ----------
    blocks
        Yields its numbers in order.
    copied
        Whether the tensor is unchanged. Only such tensors are passed to ``watch``: the caller makes the others itself.
    watched
        Yields the blocks for `JobWriter.watch`, if they differ from the written ones.
    """

    key: str
    file: int
    offset: int
    nbytes: int
    blocks: Callable[[], Iterator[Array]]
    copied: bool
    watched: Callable[[], Iterator[Array]] | None = None


@final
@dataclass(frozen=True, slots=True)
class JobWriter:
    """Writes one tensor after another.

    Attributes
    ----------
    watch : callable or None
        Called with the key and each block of every tensor that is copied, in order.
    step : callable or None
        Called with the bytes of every block that is written, in the thread that wrote it.
    """

    watch: Watch | None
    step: Step | None

    def do(self, job: WriteJob, stop: Event) -> None:
        """Write one tensor, unless ``stop`` is set."""
        offset = job.offset
        for block in job.blocks():
            if stop.is_set():
                return
            if self.watch and job.copied and job.watched is None:
                self.watch(job.key, block)
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            write_at(job.file, data, offset)
            _start_writeback(job.file, offset, len(data))
            offset += len(data)
            if self.step:
                self.step(len(data))
        for block in job.watched() if self.watch and job.watched else ():
            self.watch(job.key, block)  # type: ignore[misc]
        assert offset == job.offset + job.nbytes, (job.key, offset - job.offset, job.nbytes)


def run_jobs(jobs: Collection[WriteJob], writer: JobWriter, threads: int) -> None:
    """Do all jobs in several threads. The first error stops every thread and is raised here."""
    queue: SimpleQueue[WriteJob] = SimpleQueue()
    # The largest tensors first: else one of them could begin last and keep a single thread busy at the end.
    for job in sorted(jobs, key=lambda job: -job.nbytes):
        queue.put(job)
    # A list, because several threads may fail before the first error is seen.
    stop, errors = Event(), list[BaseException]()

    def work() -> None:
        while not stop.is_set():
            try:
                writer.do(queue.get_nowait(), stop)
            except Empty:
                return
            except BaseException as error:  # noqa: BLE001 - raised again in the calling thread, whatever it is
                errors.append(error)
                stop.set()

    workers: list[Thread] = []
    try:
        for _ in range(threads - 1):
            thread = Thread(target=work, daemon=True)
            thread.start()  # this fails without memory for a stack; the threads that run are then joined below
            workers.append(thread)
        work()
        for thread in workers:
            thread.join()
    finally:  # also after an interrupt while waiting: no thread may write after the files are removed
        stop.set()
        for thread in workers:
            thread.join()
    if errors:
        raise errors[0]


def _start_writeback(fd: int, offset: int, count: int) -> None:
    """Tell the disk to begin writing whenever another `HURRY` bytes of the file are complete, without waiting."""
    # DONTNEED starts the writeback of the range on Linux.
    first, last = offset // HURRY * HURRY, (offset + count) // HURRY * HURRY
    if first < last and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)
