"""A changed copy of a model: shard by shard, in the layout of the original, whole or not there."""

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.files.apart import Input
from loralens.formats.files.appearing import appearing, check_space, check_target
from loralens.formats.files.container import DTYPES, dumps, header_bytes, pieces
from loralens.formats.files.disk import disk
from loralens.formats.files.leftovers import tidy
from loralens.formats.files.relative_name import path_to_write
from loralens.formats.models.model_files import Index, ModelFiles, Shard, offsets_of
from loralens.formats.records.merged import check_replaceable

HURRY = 1 << 24  # bytes after which the disk is told to begin: waiting for it at the end takes 0.07 s, not 0.35
_DAMAGED = "the undo file is damaged: use another copy"
_ANOTHER = "give the undo file of the merge that wrote this model, undamaged"

Fill = Callable[[str], Iterator[Array]]  # the rows of one tensor of the copy, in order
Watch = Callable[[str, Array], None]
Step = Callable[[int], None]


@final
@dataclass(frozen=True, slots=True)
class Change:
    """One tensor of the copy that is not a copy: what it will be."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model(
    files: ModelFiles,
    target: Path,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    watch: Watch | None = None,
    dropped: Collection[str] = (),
    headers: Mapping[str, bytes] | None = None,
    texts: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    names: Mapping[str, str] | None = None,
    write_beside: Callable[[Path], None] | None = None,
    inputs: Collection[Input] = (),
    overwrite: bool = False,
    threads: int = 1,
    step: Step | None = None,
) -> None:
    """A copy of a model in which some tensors are others.

    Parameters
    ----------
    files : ModelFiles
        Never written to.
    target : Path
        A folder; a file where the model is one. It appears complete or not at all.
    changes : mapping of str to Change
        By key. A key that the model has not is added to the last shard of its component.
    fill : callable
        Takes the key of a change, gives its rows in order, each block in the dtype of the change. Called in threads,
        one tensor in each.
    watch : callable or None
        Sees the rows of every tensor that is copied, in order: its key and each block.
    dropped : collection of str
        Keys that the copy is to lack.
    headers : mapping of str to bytes, or None
        The whole header of some shards, length and JSON, as it is to stand there: it says which tensors they hold.
    texts : mapping of str to str, or None
        What other files of the folder are to hold instead.
    without : collection of str
        Other files that do not come along.
    names : mapping of str to str, or None
        Other files that come along under another name.
    write_beside : callable or None
        Writes further files into the folder before it takes its place.
    inputs : collection of (str, Path)
        What is read, in words and where, the model itself first: the target is none of it, holds none and lies in
        none.
    overwrite : bool
        Let the copy take the place of what stands at ``target``: by two renames, so that one of the two is whole.
    threads : int
        Tensors worked on at a time.
    step : callable or None
        Told the bytes of every block when it is written, in the thread that wrote it: `copy_bytes` in all.

    Raises
    ------
    OptionError
        The target exists, or is not apart from the inputs, or holds files that would be lost.
    FormatError
        The disk refuses.
    """
    with place(target), disk():
        tidy(target)
        known_inputs = inputs or [("the base", files.root)]
        check_target(target, known_inputs, folder=files.root.is_dir(), overwrite=overwrite)
        if target.is_dir():
            check_replaceable(target, _file_names(files, without, names or {}))
    with appearing(target, folder=files.root.is_dir(), overwrite=overwrite) as part, ExitStack() as opened:
        if files.root.is_dir():
            _copy_others(files, part, _new_names(files, without, names or {}))
            for index in files.indices:
                _write_text(path_to_write(part, index.name), _index_text(index, files, changes, dropped))
            for name, text in (texts or {}).items():
                _write_text(path_to_write(part, name), text)
        jobs, tensors = list[_Job](), files.tensors
        check_space(target, copy_bytes(tensors, changes))
        for shard in files.shards:
            fd = os.open(
                path_to_write(part, shard.name) if files.root.is_dir() else part, os.O_RDWR | os.O_CREAT, 0o666
            )
            opened.callback(os.close, fd)
            jobs += _jobs(shard, fd, files, _Outline(changes, frozenset(dropped), (headers or {}).get(shard.name)))
        _run(sorted(jobs, key=lambda job: -job.nbytes), _Work(fill, watch, step), threads)
        if write_beside:
            write_beside(part)


def copy_bytes(tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> int:
    """Bytes of all tensors of a copy, those that it is to lack among them."""
    return sum(_spec(key, tensors, changes).nbytes for key in {*tensors, *changes})


def _new_names(files: ModelFiles, without: Collection[str], names: Mapping[str, str]) -> dict[str, str]:
    """Other files that come along, and their names in the copy."""
    return {name: names.get(name, name) for name in files.companions if name not in without}


def _file_names(files: ModelFiles, without: Collection[str], names: Mapping[str, str]) -> set[str]:
    """Every file of the copy."""
    weights = {*(shard.name for shard in files.shards), *(index.name for index in files.indices)}
    return weights | {*_new_names(files, without, names).values()}


def _copy_others(files: ModelFiles, part: Path, names: Mapping[str, str]) -> None:
    """Everything that is not weights under its new name, links followed."""
    for name in (*names.values(), *(shard.name for shard in files.shards)):
        path_to_write(part, name).parent.mkdir(parents=True, exist_ok=True)
    for name, new in names.items():
        shutil.copyfile(files.root / name, path_to_write(part, new))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _index_text(index: Index, files: ModelFiles, changes: Mapping[str, Change], dropped: Collection[str]) -> str:
    """The index with the keys that came and went, and the size that changed; as it was where nothing did.

    Some indices name tensors that no shard holds: these stay, and take no bytes.
    """
    tensors = files.tensors
    old = index.content["weight_map"]
    names = {key: shard for key, shard in old.items() if index.prefix + key not in dropped}
    homes = {key: _shard_for(key, files) for key in changes if key not in tensors}
    names |= {
        key.removeprefix(index.prefix): Path(home.name).name
        for key, home in homes.items()
        if home.prefix == index.prefix
    }
    all_keys = {*tensors, *changes}
    size = sum(_spec(key, tensors, changes).nbytes for name in names if (key := index.prefix + name) in all_keys)
    if names == old and size == sum(tensors[key].nbytes for name in old if (key := index.prefix + name) in tensors):
        return (files.root / index.name).read_bytes().decode("utf-8")  # the ends of its lines too
    old_metadata = index.content.get("metadata")
    metadata = {**(old_metadata if isinstance(old_metadata, dict) else {}), "total_size": size}
    return dumps({**index.content, "metadata": metadata, "weight_map": names})


def _shard_for(key: str, files: ModelFiles) -> Shard:
    """Where a tensor goes that the model has not: the last shard of its component."""
    own = [shard for shard in files.shards if key.startswith(shard.prefix)]
    return (own or files.shards)[-1]


def _spec(key: str, tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> Change:
    """What a tensor of the copy will be."""
    return changes[key] if key in changes else Change(tensors[key].dtype, tensors[key].shape)


@final
@dataclass(frozen=True, slots=True)
class _Outline:
    """How one shard of the copy differs from its original."""

    changes: Mapping[str, Change]
    dropped: Collection[str]
    header: bytes | None


@final
@dataclass(frozen=True, slots=True)
class _Job:
    """One tensor to be written at its place."""

    key: str
    file: int
    offset: int
    nbytes: int
    source: LazyArray | None  # to be copied; None: to be filled


def _jobs(shard: Shard, fd: int, files: ModelFiles, outline: _Outline) -> Iterator[_Job]:
    """The file of a shard at its full size with its header, and the work left to do in it.

    The header stays byte for byte where no tensor changes its dtype, its shape or its place.
    """
    tensors, changes = files.tensors, outline.changes
    header: bytes
    offsets: Mapping[str, int]
    if outline.header:
        header = outline.header
        specs, offsets = _specs_of(header, shard.name)
    else:
        keys = [shard.prefix + key for key in shard.stored.tensors if shard.prefix + key not in outline.dropped]
        keys += [key for key in changes if key not in tensors and _shard_for(key, files) is shard]
        specs = {key.removeprefix(shard.prefix): _spec(key, tensors, changes) for key in keys}
        header, offsets = shard.header, shard.offsets
        if not _have_same_layout(specs, shard.stored.tensors):
            header = header_bytes({key: _placeholder(spec) for key, spec in specs.items()}, shard.stored.metadata)
            offsets = offsets_of(header[8:])
    for key, spec in specs.items():
        full_key = shard.prefix + key
        if not (full_key in changes or full_key in tensors) or _spec(full_key, tensors, changes) != spec:
            raise FormatError(f"{shard.name}: its header and the model differ in {key}", fix=_ANOTHER)
    os.truncate(fd, len(header) + sum(spec.nbytes for spec in specs.values()))
    _write_at(fd, header, 0)
    for key, spec in specs.items():
        full_key = shard.prefix + key
        yield _Job(
            full_key, fd, len(header) + offsets[key], spec.nbytes, None if full_key in changes else tensors[full_key]
        )


def _specs_of(header: bytes, name: str) -> tuple[dict[str, Change], dict[str, int]]:
    """What a header says of its tensors, and where the numbers of each begin."""
    try:
        entries = json.loads(header[8:])
        specs = {
            key: Change(DTYPES[entry["dtype"]], tuple(entry["shape"]))
            for key, entry in entries.items()
            if key != "__metadata__"
        }
        position = 0
        for key in sorted(specs, key=lambda key: entries[key]["data_offsets"]):
            begin, position = position, position + specs[key].nbytes
            if entries[key]["data_offsets"] != [begin, position]:
                raise ValueError(f"offsets of {key}")
        return specs, offsets_of(header[8:])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(
            f"{name}: its header is not as it was written ({ascii(error)[:120]})", fix=_DAMAGED
        ) from error


def _have_same_layout(specs: Mapping[str, Change], tensors: Mapping[str, LazyArray]) -> bool:
    """Whether the tensors are those that were there, of the same dtypes and shapes."""
    return set(specs) == set(tensors) and all(
        (spec.dtype, spec.shape) == (tensors[key].dtype, tensors[key].shape) for key, spec in specs.items()
    )


def _placeholder(spec: Change) -> LazyArray:
    """Something of this dtype and shape, for the header."""
    return LazyArray(lambda: np.empty(spec.shape, spec.dtype), shape=spec.shape, dtype=spec.dtype)


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """What is done with every tensor, and who is told."""

    fill: Fill
    watch: Watch | None
    step: Step | None

    def do(self, job: _Job, stop: Event) -> None:
        """One tensor, unless somebody says stop."""
        offset = job.offset
        for block in self.fill(job.key) if job.source is None else pieces(job.source):
            if stop.is_set():
                return
            if self.watch and job.source is not None:
                self.watch(job.key, block)
            data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
            _write_at(job.file, data, offset)
            _start_writeback(job.file, offset, len(data))
            offset += len(data)
            if self.step:
                self.step(len(data))
        assert offset == job.offset + job.nbytes, (job.key, offset - job.offset, job.nbytes)


def _run(jobs: list[_Job], doing: _Work, threads: int) -> None:
    """Do all jobs; the first error stops every thread and is raised here."""
    queue: SimpleQueue[_Job] = SimpleQueue()
    for job in jobs:
        queue.put(job)
    stop, errors = Event(), list[BaseException]()

    def work() -> None:
        while not stop.is_set():
            try:
                doing.do(queue.get_nowait(), stop)
            except Empty:
                return
            except BaseException as error:  # noqa: BLE001 - handed to the caller, whatever it is
                errors.append(error)
                stop.set()

    workers: list[Thread] = []
    try:
        for _ in range(threads - 1):
            thread = Thread(target=work, daemon=True)
            thread.start()  # fails where memory is at its end: those that run are waited for all the same
            workers.append(thread)
        work()
        for thread in workers:
            thread.join()
    finally:  # an interrupt while waiting
        stop.set()
        for thread in workers:
            thread.join()
    if errors:
        raise errors[0]


def _write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of the data, at its place."""
    view = memoryview(data)
    while len(view):
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count


def _start_writeback(fd: int, offset: int, count: int) -> None:
    """Let the disk begin with what was written up to here, every so many bytes; nobody waits for it."""
    first, last = offset // HURRY * HURRY, (offset + count) // HURRY * HURRY
    if first < last and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, first, last - first, os.POSIX_FADV_DONTNEED)
