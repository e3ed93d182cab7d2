"""Writing a changed copy of a model in the layout of the original. The copy appears complete or not at all."""

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, final

import numpy as np

from loralens.core.lazy import Array, LazyArray, without_numbers
from loralens.errors import FormatError, place
from loralens.formats.files.atomic import Input, atomic_path, check_space, check_write_target, tidy
from loralens.formats.files.container import as_bytes, header_bytes, parse_header, tensor_pieces
from loralens.formats.files.disk import disk_errors, start_writeback, write_at
from loralens.formats.files.json_text import dumps
from loralens.formats.files.outside import path_to_write, read_whole
from loralens.formats.models.model_files import Index, ModelFiles, WeightFile
from loralens.formats.records.merged_files import check_replaceable

Fill = Callable[[str], Iterator[Array]]  # the rows of one tensor of the copy, in order
Watch = Callable[[str, Array], None]
Step = Callable[[int], None]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class CopyOptions:
    """How a copy is written.

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
    write_beside : callable or None
        Writes further files into the folder before it takes its place.
    inputs : collection of (str, Path)
        Everything that is read, each with a description and its path; the model itself is the first. The target must
        not overlap with any of them.
    overwrite : bool
        Let the copy replace an existing target. At every moment, the old or the new one is complete.
    threads : int
        The number of tensors that are processed at a time.
    step : callable or None
        Called with the bytes of every block that is written, in the thread that wrote it.
    dropped : collection of str
        Keys that a copy of safetensors leaves out.
    homes : mapping of str to str
        New key → a key of the model; the new tensor is written to the shard of that key (safetensors).
    headers : mapping of str to bytes
        The complete headers (length and JSON) of some shards. They say which tensors these shards hold (safetensors).
    """

    watch: Watch | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    without: Collection[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    write_beside: Callable[[Path], None] | None = None
    inputs: Collection[Input] = ()
    overwrite: bool = False
    threads: int = 1
    step: Step | None = None
    dropped: Collection[str] = ()
    homes: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, bytes] = field(default_factory=dict)


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
    folder, overwrite = files.root.is_dir(), options.overwrite
    companions = {name: options.names.get(name, name) for name in files.companions if name not in options.without}
    with place(target), disk_errors():
        tidy(target)
        inputs = options.inputs or [("the base", files.root)]
        check_write_target(target, inputs, folder=folder, overwrite=overwrite)
        # Unrelated files in the folder would be lost, so they are refused even with `overwrite`.
        if target.is_dir():
            weights = {*(shard.name for shard in files.shards), *(index.name for index in files.indices)}
            check_replaceable(target, weights | {*companions.values()})
    with atomic_path(target, folder=folder, overwrite=overwrite) as part:
        if folder:
            # The folders of shards are made too, although their files are made later.
            for name in (*companions.values(), *(shard.name for shard in files.shards)):
                path_to_write(part, name).parent.mkdir(parents=True, exist_ok=True)
            # copyfile follows links, so that the copy does not depend on a cache.
            for name, new in companions.items():
                shutil.copyfile(files.root / name, path_to_write(part, new))
            for name, text in options.texts.items():
                write_text(path_to_write(part, name), text)
        yield part


def write_text(path: Path, text: str) -> None:
    """Write a text with the line endings that it has."""
    path.write_text(text, encoding="utf-8", newline="")


def open_part(unfinished: Path, files: ModelFiles, name: str, size: int, opened: ExitStack) -> int:
    """The descriptor of a new file of a copy, until ``opened`` is closed.

    With the full size set first, threads can write tensors at their positions in any order.
    """
    path = path_to_write(unfinished, name) if files.root.is_dir() else unfinished
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    opened.callback(os.close, descriptor)
    os.truncate(descriptor, size)
    return descriptor


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
                _do(job, stop, options.watch, options.step)
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(options.threads) as pool:
        try:
            # The largest tensors first: else one of them could begin last and keep a single thread busy at the end.
            done = [pool.submit(work, job) for job in sorted(jobs, key=lambda job: -job.nbytes)]
            for each in as_completed(done):
                each.result()
        finally:  # also after an interrupt while waiting: no thread may write after the files are removed
            stop.set()
    if options.write_beside:
        options.write_beside(part)


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
    options: CopyOptions = CopyOptions(),
) -> None:
    """Write a copy of a model in which some tensors are changed.

    Parameters
    ----------
    files : ModelFiles
        The files of the original, which are only read.
    target : Path
        A folder, or a file if the model is a file. It appears complete or not at all.
    changes : mapping of str to Change
        By key. A key that the model does not have is added to the shard that ``options.homes`` says, or else to the
        last shard of its component.
    fill : callable
        Gives the rows of a changed tensor by its key, in order and in blocks of the new dtype. It is called in several
        threads, each for one tensor.
    options : CopyOptions
        The steps have `copy_bytes` in all.

    Raises
    ------
    OptionError
        The target exists, or overlaps with an input, or holds files that would be lost.
    FormatError
        The disk reports an error.
    """
    assert files.gguf is None, "GGUF files are copied by write_gguf_copy"
    tensors = files.tensors
    specs = {key: Change(tensor.dtype, tensor.shape) for key, tensor in tensors.items()} | {**changes}
    # shard → the keys of its tensors in the copy
    keys = {
        shard.name: [key for name in shard.stored.tensors if (key := shard.prefix + name) not in options.dropped]
        for shard in files.shards
    }
    for key in (key for key in changes if key not in tensors):
        keys[_shard_for(options.homes.get(key, key), files).name].append(key)
    with new_copy(files, target, options) as part, ExitStack() as opened:
        # If an undo file gives the original text of an index, `new_copy` has written it already.
        for index in files.indices if files.root.is_dir() else ():
            if index.name not in options.texts:
                write_text(path_to_write(part, index.name), _index_text(index, files, keys, specs, options.dropped))
        check_space(target, copy_bytes(tensors, changes))
        jobs = list[WriteJob]()
        for shard in files.shards:
            own = {key.removeprefix(shard.prefix): specs[key] for key in keys[shard.name]}
            header = options.headers.get(shard.name) or _header(shard, own)
            try:
                _, spans = parse_header(header)
            except FormatError as error:
                what = f"{shard.name}: its header is not as it was written ({error.what})"
                raise FormatError(what, fix=_DAMAGED) from error
            size = len(header) + max((span.end for span in spans.values()), default=0)
            fd = open_part(part, files, shard.name, size, opened)
            write_at(fd, header, 0)
            for name, span in spans.items():
                key = shard.prefix + name
                # A header that the caller gives comes from an undo file, which may belong to another model.
                if specs.get(key) != Change(span.dtype, span.shape):
                    raise FormatError(f"{shard.name}: its header and the model differ in {name}", fix=_ANOTHER)
                blocks = partial(fill, key) if key in changes else partial(tensor_pieces, tensors[key])
                jobs.append(
                    WriteJob(key, fd, len(header) + span.begin, specs[key].nbytes, blocks, copied=key not in changes)
                )
        write_jobs(part, jobs, options)


def copy_bytes(tensors: Mapping[str, LazyArray], changes: Mapping[str, Change]) -> int:
    """The bytes of all tensors of the original and the changes, also of those that the copy leaves out."""
    sizes = {key: tensor.nbytes for key, tensor in tensors.items()}
    return sum({**sizes, **{key: change.nbytes for key, change in changes.items()}}.values())


def _index_text(
    index: Index,
    files: ModelFiles,
    keys: Mapping[str, Collection[str]],
    specs: Mapping[str, Change],
    dropped: Collection[str],
) -> str:
    """The index with added and dropped keys and the new total size; byte for byte the old one if nothing changed.

    Some indices name tensors that no shard holds. These stay in the index and add nothing to the total size.
    """
    old, prefix, tensors = index.content["weight_map"], index.prefix, files.tensors
    names = {key: shard for key, shard in old.items() if prefix + key not in dropped}
    for shard in files.shards:
        if shard.prefix == prefix:
            new = (key.removeprefix(prefix) for key in keys[shard.name] if key not in tensors)
            names |= dict.fromkeys(new, Path(shard.name).name)
    size = sum(specs[prefix + name].nbytes for name in names if prefix + name in specs)
    if names == old and size == sum(tensors[prefix + name].nbytes for name in old if prefix + name in tensors):
        # `read_text` would change the line ends of Windows.
        return read_whole(files.root / index.name).decode("utf-8")
    old_metadata = index.content.get("metadata")
    metadata = {**(old_metadata if isinstance(old_metadata, dict) else {}), "total_size": size}
    return dumps({**index.content, "metadata": metadata, "weight_map": names})


def _shard_for(key: str, files: ModelFiles) -> WeightFile:
    """The shard that holds a tensor; for one that the model does not have, the last shard of its component."""
    # The prefix of a single model is empty, so all of its shards fit.
    own = [shard for shard in files.shards if key.startswith(shard.prefix)]
    holding = (shard for shard in own if key.removeprefix(shard.prefix) in shard.stored.tensors)
    return next(holding, (own or files.shards)[-1])


def _header(shard: WeightFile, specs: Mapping[str, Change]) -> bytes:
    """The header of a shard; byte for byte the old one if no tensor changes its dtype, its shape or its shard."""
    if specs == {key: Change(tensor.dtype, tensor.shape) for key, tensor in shard.stored.tensors.items()}:
        return shard.header
    empty = {key: without_numbers(spec.shape, spec.dtype) for key, spec in specs.items()}
    return header_bytes(empty, shard.stored.metadata)
