"""Making a changed copy of a model: the checks before it, the files beside the weights, and the threads that write.

What is written where is decided for each container: `loralens.formats.models.model_writer` for safetensors, and
`loralens.formats.models.gguf_writer` for GGUF.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import NamedTuple, TypedDict

import numpy as np

from loralens.core.lazy import Array
from loralens.errors import place
from loralens.formats.files.apart import Input
from loralens.formats.files.atomic import atomic_path, check_still_free, check_write_target
from loralens.formats.files.disk import disk_errors, release_pages, start_writeback, write_at
from loralens.formats.files.leftovers import tidy
from loralens.formats.files.relative_name import path_to_write
from loralens.formats.models.model_files import ModelFiles
from loralens.formats.records.merged import check_replaceable

Fill = Callable[[str], Iterator[Array]]  # the rows of one tensor of the copy, in order
Watch = Callable[[str, Array], None]
Step = Callable[[int], None]


class CopyOptions(TypedDict, total=False):
    """How a copy is written: the options of the writers of all containers.

    Attributes
    ----------
    watch : callable or None
        Called with the key and each block of every tensor that is copied as it is, in order.
    texts : mapping of str to str
        New contents of other files of the folder.
    without : collection of str
        Other files that are not copied.
    names : mapping of str to str
        Other files that are copied under a new name.
    write_beside : callable
        Writes further files into the folder before it takes its place.
    inputs : collection of (str, Path)
        Everything that is read, each with a description and its path; the model itself is the first. The target must
        not overlap with any of them.
    overwrite : bool
        Let the copy replace an existing target. At every moment, the old or the new one is complete.
    threads : int
        The number of tensors that are processed at a time, 1 by default.
    step : callable or None
        Called with the bytes of every block that is written, in the thread that wrote it.
    """

    watch: Watch | None
    texts: Mapping[str, str]
    without: Collection[str]
    names: Mapping[str, str]
    write_beside: Callable[[Path], None]
    inputs: Collection[Input]
    overwrite: bool
    threads: int
    step: Step | None


@contextmanager
def new_copy(files: ModelFiles, target: Path, options: CopyOptions) -> Iterator[Path]:
    """Yield the path of the unfinished copy, which has all but the weights. After the block it becomes the target.

    ``target`` is a folder, or a file if the model is a file.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error.
    """
    folder, overwrite = files.root.is_dir(), options.get("overwrite", False)
    names, left_out = options.get("names", {}), options.get("without", ())
    companions = {name: names.get(name, name) for name in files.companions if name not in left_out}
    with place(target), disk_errors():
        tidy(target)
        inputs = options.get("inputs") or [("the base", files.root)]
        check_write_target(target, inputs, folder=folder, overwrite=overwrite)
        # Unrelated files in the folder would be lost, so they are refused even with `overwrite`.
        if target.is_dir():
            weights = {*(shard.name for shard in files.shards), *(index.name for index in files.indices)}
            check_replaceable(target, weights | {*companions.values()})
    with atomic_path(target, folder=folder, overwrite=overwrite) as part:
        # A model that is one file has records beside it. Those of two runs at once could be mixed.
        check_still_free(target, overwrite=overwrite)
        release_pages(target)
        if folder:
            _copy_others(files, part, companions)
            for name, text in options.get("texts", {}).items():
                write_text(path_to_write(part, name), text)
        yield part


def _copy_others(files: ModelFiles, part: Path, names: Mapping[str, str]) -> None:
    """Copy all files other than weights under their new names; links are followed."""
    # The folders of shards are made too, although their files are made later.
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
        Yields the blocks for ``watch``, if they differ from the written ones.
    """

    key: str
    file: int
    offset: int
    nbytes: int
    blocks: Callable[[], Iterator[Array]]
    copied: bool
    watched: Callable[[], Iterator[Array]] | None = None


def write_jobs(part: Path, jobs: Collection[WriteJob], options: CopyOptions) -> None:
    """Do all jobs in several threads, and write what belongs beside them into the unfinished copy ``part``.

    The first error stops every thread and is raised here.
    """
    queue: SimpleQueue[WriteJob] = SimpleQueue()
    # The largest tensors first: else one of them could begin last and keep a single thread busy at the end.
    for job in sorted(jobs, key=lambda job: -job.nbytes):
        queue.put(job)
    # A list, because several threads may fail before the first error is seen.
    stop, errors = Event(), list[BaseException]()

    def work() -> None:
        while not stop.is_set():
            try:
                _do(queue.get_nowait(), stop, options.get("watch"), options.get("step"))
            except Empty:
                return
            # The calling thread raises it again, whatever it is.
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                stop.set()

    workers: list[Thread] = []
    try:
        for _ in range(options.get("threads", 1) - 1):
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
    if "write_beside" in options:
        options["write_beside"](part)


def _do(job: WriteJob, stop: Event, watch: Watch | None, step: Step | None) -> None:
    """Write one tensor, unless ``stop`` is set."""
    offset = job.offset
    for block in job.blocks():
        if stop.is_set():
            return
        if watch and job.copied and job.watched is None:
            watch(job.key, block)
        data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
        write_at(job.file, data, offset)
        start_writeback(job.file, offset, len(data))
        offset += len(data)
        if step:
            step(len(data))
    for block in job.watched() if watch and job.watched else ():
        watch(job.key, block)  # type: ignore[misc]
    assert offset == job.offset + job.nbytes, (job.key, offset - job.offset, job.nbytes)
