"""Writing a changed copy of a model in the layout of the original. The copy appears complete or not at all."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypedDict, Unpack, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.stored import parse_json
from loralens.errors import FormatError, place
from loralens.formats.files.atomic import Input, atomic_path, check_space, check_write_target, tidy
from loralens.formats.files.container import DTYPES, as_bytes, header_bytes, tensor_pieces
from loralens.formats.files.disk import disk_errors, start_writeback, write_at
from loralens.formats.files.json_text import dumps
from loralens.formats.files.outside import path_to_write, read_whole
from loralens.formats.models.model_files import Index, ModelFiles, WeightFile, offsets_of
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
    stop = Event()

    def work(job: WriteJob) -> None:
        try:
            if not stop.is_set():
                _do(job, stop, options.get("watch"), options.get("step"))
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(options.get("threads", 1)) as pool:
        try:
            # The largest tensors first: else one of them could begin last and keep a single thread busy at the end.
            done = [pool.submit(work, job) for job in sorted(jobs, key=lambda job: -job.nbytes)]
            for each in as_completed(done):
                each.result()
        finally:  # also after an interrupt while waiting: no thread may write after the files are removed
            stop.set()
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
        data = as_bytes(block)
        write_at(job.file, data, offset)
        start_writeback(job.file, offset, len(data))
        offset += len(data)
        if step:
            step(len(data))
    for block in job.watched() if watch and job.watched else ():
        watch(job.key, block)  # type: ignore[misc]
    assert offset == job.offset + job.nbytes, (job.key, offset - job.offset, job.nbytes)


# Headers come only from an undo file, so a bad header means that this file is damaged.
_DAMAGED = "the undo file is damaged: use another copy"
_ANOTHER = "give the undo file of the merge that wrote this model, undamaged"


@final
@dataclass(frozen=True, slots=True)
class Change:
    """The dtype and shape of a tensor of the copy that differs from the original."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor in the file."""
        return prod(self.shape) * self.dtype.itemsize


def write_model(
    files: ModelFiles,
    target: Path,
    *,
    changes: Mapping[str, Change],
    fill: Fill,
    dropped: Collection[str] = (),
    homes: Mapping[str, str] | None = None,
    headers: Mapping[str, bytes] | None = None,
    **options: Unpack[CopyOptions],
) -> None:
    """Write a copy of a model in which some tensors are changed.

    Parameters
    ----------
    files : ModelFiles
        The files of the original, which are only read.
    target : Path
        A folder, or a file if the model is a file. It appears complete or not at all.
    changes : mapping of str to Change
        By key. A key that the model does not have is added to the shard that ``homes`` says, or else to the last shard
        of its component.
    fill : callable
        Gives the rows of a changed tensor by its key, in order and in blocks of the new dtype. It is called in several
        threads, each for one tensor.
    dropped : collection of str
        Keys that the copy leaves out.
    homes : mapping of str to str, or None
        New key → a key of the model; the new tensor is written to the shard of that key.
    headers : mapping of str to bytes, or None
        The complete headers (length and JSON) of some shards. They say which tensors these shards hold.
    **options : CopyOptions
        The steps have `copy_bytes` in all.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error.
    """
    assert files.gguf is None, "GGUF files are copied by write_gguf_copy"
    with new_copy(files, target, options) as part, ExitStack() as opened:
        if files.root.is_dir():
            # If an undo file gives the original text of an index, `new_copy` has written it already.
            for index in (index for index in files.indices if index.name not in options.get("texts", {})):
                write_text(path_to_write(part, index.name), _index_text(index, files, changes, dropped, homes or {}))
        jobs, tensors = list[WriteJob](), files.tensors
        check_space(target, copy_bytes(tensors, changes))
        for shard in files.shards:
            path = path_to_write(part, shard.name) if files.root.is_dir() else part
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, fd)
            parts = frozenset(dropped), homes or {}, (headers or {}).get(shard.name)
            jobs += _jobs(shard, fd, files, changes, fill, *parts)
        write_jobs(part, jobs, options)


def copy_bytes(tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> int:
    """The bytes of all tensors of the original and the changes, also of those that the copy leaves out."""
    return sum(_spec(key, tensors, changes).nbytes for key in {*tensors, *changes})


def _index_text(
    index: Index,
    files: ModelFiles,
    changes: Mapping[str, Change],
    dropped: Collection[str],
    homes: Mapping[str, str],
) -> str:
    """The index with added and dropped keys and the new total size; byte for byte the old one if nothing changed.

    Some indices name tensors that no shard holds. These stay in the index and add nothing to the total size.
    """
    tensors = files.tensors
    old = index.content["weight_map"]
    names = {key: shard for key, shard in old.items() if index.prefix + key not in dropped}
    shards = {key: _shard_for(key, files, homes) for key in changes if key not in tensors}
    names |= {
        key.removeprefix(index.prefix): Path(shard.name).name
        for key, shard in shards.items()
        if shard.prefix == index.prefix
    }
    all_keys = {*tensors, *changes}
    size = sum(_spec(key, tensors, changes).nbytes for name in names if (key := index.prefix + name) in all_keys)
    if names == old and size == sum(tensors[key].nbytes for name in old if (key := index.prefix + name) in tensors):
        # `read_text` would change the line ends of Windows.
        return read_whole(files.root / index.name).decode("utf-8")
    old_metadata = index.content.get("metadata")
    metadata = {**(old_metadata if isinstance(old_metadata, dict) else {}), "total_size": size}
    return dumps({**index.content, "metadata": metadata, "weight_map": names})


def _shard_for(key: str, files: ModelFiles, homes: Mapping[str, str]) -> WeightFile:
    """The shard for a tensor that the model does not have: that of its home, or the last one of its component."""
    if key in homes:
        home = homes[key]
        return next(
            shard
            for shard in files.shards
            if home.startswith(shard.prefix) and home.removeprefix(shard.prefix) in shard.stored.tensors
        )
    # The prefix of a single model is empty, so all of its shards fit.
    own = [shard for shard in files.shards if key.startswith(shard.prefix)]
    return (own or files.shards)[-1]


def _spec(key: str, tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> Change:
    """The dtype and shape of a tensor of the copy."""
    return changes[key] if key in changes else Change(tensors[key].dtype, tensors[key].shape)


def _jobs(
    shard: WeightFile,
    fd: int,
    files: ModelFiles,
    changes: Mapping[str, Change],
    fill: Fill,
    dropped: Collection[str],
    homes: Mapping[str, str],
    header: bytes | None,
) -> Iterator[WriteJob]:
    """Give a shard's file its full size and its header, and return the tensors that are still to be written.

    The header stays byte for byte the same if no tensor changes its dtype, its shape or its shard.
    """
    tensors = files.tensors
    if header:
        specs = _specs_of(header, shard.name)
    else:
        keys = [shard.prefix + key for key in shard.stored.tensors if shard.prefix + key not in dropped]
        keys += [key for key in changes if key not in tensors and _shard_for(key, files, homes) is shard]
        specs = {key.removeprefix(shard.prefix): _spec(key, tensors, changes) for key in keys}
        header = shard.header
        if specs != {key: Change(t.dtype, t.shape) for key, t in shard.stored.tensors.items()}:
            # These arrays are never made: a header needs only their dtype and shape.
            empty = {
                key: LazyArray(partial(np.empty, spec.shape, spec.dtype), shape=spec.shape, dtype=spec.dtype)
                for key, spec in specs.items()
            }
            header = header_bytes(empty, shard.stored.metadata)
    offsets = offsets_of(header[8:])
    # A header that the caller gives comes from an undo file, which may belong to another model.
    for key, spec in specs.items():
        full_key = shard.prefix + key
        if not (full_key in changes or full_key in tensors) or _spec(full_key, tensors, changes) != spec:
            raise FormatError(f"{shard.name}: its header and the model differ in {key}", fix=_ANOTHER)
    # With the full size set first, threads can write tensors at their positions in any order.
    os.truncate(fd, len(header) + sum(spec.nbytes for spec in specs.values()))
    write_at(fd, header, 0)
    for key, spec in specs.items():
        full_key = shard.prefix + key
        copied = full_key not in changes
        blocks = partial(tensor_pieces, tensors[full_key]) if copied else partial(fill, full_key)
        yield WriteJob(full_key, fd, len(header) + offsets[key], spec.nbytes, blocks, copied)


def _specs_of(header: bytes, name: str) -> dict[str, Change]:
    """The tensors that a header describes."""
    try:
        entries = {key: entry for key, entry in parse_json(header[8:]).items() if key != "__metadata__"}
        specs = {key: Change(DTYPES[entry["dtype"]], tuple(entry["shape"])) for key, entry in entries.items()}
        position = 0
        # Tensors must follow each other without gaps: the file is as long as their sum.
        for key in sorted(specs, key=lambda key: entries[key]["data_offsets"]):
            begin, position = position, position + specs[key].nbytes
            if entries[key]["data_offsets"] != [begin, position]:
                raise ValueError(f"offsets of {key}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{name}: its header is not as it was written ({ascii(error)[:120]})"
        raise FormatError(what, fix=_DAMAGED) from error
    return specs
