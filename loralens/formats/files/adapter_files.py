"""Writing the files of an adapter: they appear complete or not at all, and old ones are kept until then."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

from loralens.core.lazy import LazyArray
from loralens.core.messages import quote_word
from loralens.core.threads import in_order, processor_count
from loralens.errors import FormatError, LoraLensError, OptionError, place, target_exists
from loralens.formats.files.atomic import (
    COMPANIONS,
    Put,
    atomic_file,
    atomic_path,
    is_moved_aside,
    replaced_together,
    tidy,
    tidy_folder,
)
from loralens.formats.files.container import (
    CONFIG,
    HASHES,
    PEFT,
    RECORD,
    Files,
    Stored,
    as_bytes,
    by_width,
    header_bytes,
    read_safetensors,
    tensor_pieces,
    with_digest,
)
from loralens.formats.files.disk import check_room, disk_errors
from loralens.formats.files.json_text import dumps
from loralens.formats.files.location import NAMES, SUFFIXES, container_of, weights_among

# Bytes of the largest tensor up to which several are computed ahead, and the threads that do so. They hold at most
# twice as many tensors, so at most 32 MiB. A factor of rank 64 for 11,008 inputs has 2.7 MiB.
AHEAD = 1 << 22
AHEAD_THREADS = 4
# Keys of factors that the configuration beside them describes: of PEFT, mlx-lm, loralib, torchtune, litgpt, and of
# diffusers and ComfyUI where they look like PEFT's. kohya's names have neither these ends nor this beginning.
_FACTOR = re.compile(r"\blora_(?:embedding_)?[ABab]\b|^base_model\.model\.")


def write_safetensors(stored: Stored, path: Path, *, put: Put = atomic_file) -> None:
    """Write tensors and metadata, one tensor at a time, while threads compute the next ones.

    The same input gives the same bytes. Before the file takes its place, the reference implementation of the format
    opens it as a check. ``put`` gives the stream to write to.
    """
    from safetensors import SafetensorError, safe_open

    with put(path) as stream:
        threads = min(AHEAD_THREADS, processor_count())
        write_tensors(stream, by_width(stored.tensors.items()), stored.metadata, threads=threads)
        stream.flush()
        try:
            with safe_open(stream.name, framework="numpy") as check:
                for key in check.keys():  # noqa: SIM118 - it is no mapping
                    check.get_slice(key)
        except SafetensorError as error:
            what = f"safetensors cannot read what was written ({error})"
            raise FormatError(what, fix="report this as a bug") from error


def write_tensors(
    stream: BinaryIO, tensors: Mapping[str, LazyArray], metadata: Mapping[str, str] | None, *, threads: int = 1
) -> None:
    """Write a safetensors file, while ``threads`` compute the next tensors; hashes in the metadata become true."""
    metadata = metadata and with_digest(metadata)
    digest = sha256() if metadata and not metadata.keys().isdisjoint(HASHES) else None
    stream.write(header_bytes(tensors, metadata))
    arrays = list(tensors.values())
    # A tensor that streams is only copied, which no thread would speed up, and may be large.
    calls = [_nothing if tensor.streams else tensor.read for tensor in arrays]
    largest = max((tensor.nbytes for tensor in arrays if not tensor.streams), default=0)
    for tensor, array in zip(arrays, in_order(calls, threads if largest <= AHEAD else 1), strict=True):
        for piece in map(as_bytes, tensor_pieces(tensor) if array is None else [array]):
            stream.write(piece)
            if digest:
                digest.update(piece)
    if digest:
        stream.seek(0)
        stream.write(header_bytes(tensors, with_digest(metadata or {}, digest.hexdigest())))


def _nothing() -> None:
    """The call of a tensor that is not computed ahead."""


def write_files(stored: Stored, path: Path, *, files: Files, overwrite: bool, dry_run: bool = False) -> None:
    """Write into a folder, or to a file if ``path`` has the suffix of one; a dry run only makes the checks."""
    suffix = Path(files.weights).suffix
    if _is_misspelt(path.suffix):
        # It would become a folder of this name.
        raise OptionError(f"{path}: no adapter file ends in {path.suffix}", fix=f"a file ends in {suffix}")
    if path.suffix in SUFFIXES and path.suffix != suffix:
        what = f"{path}: this format is not written to {path.suffix} files"
        raise OptionError(what, fix=f"give a folder, or a file ending in {suffix}")
    # Only a file has the suffix of the format; a new folder may have any name.
    write = write_file if path.suffix == suffix else write_folder
    write(stored, path, files=files, overwrite=overwrite, dry_run=dry_run)


def _is_misspelt(suffix: str) -> bool:
    """Whether a suffix is nearly that of safetensors, or that of another container in capitals."""
    if suffix in SUFFIXES:
        return False
    from difflib import SequenceMatcher  # takes 5 ms to import, and few suffixes are that long

    plain = suffix.lower().strip()
    # 0.85 accepts two wrong or missing letters of the twelve, and no other word that ends a name.
    return plain in SUFFIXES or (len(plain) > 8 and SequenceMatcher(None, plain, ".safetensors").ratio() >= 0.85)


def write_folder(stored: Stored, folder: Path, *, overwrite: bool, files: Files = PEFT, dry_run: bool = False) -> None:
    """Write the files of a dialect into a folder; a new folder appears complete or not at all.

    Raises
    ------
    OptionError
        The folder exists and ``overwrite`` is false, or it holds an adapter of another dialect, or it is a file.
    """
    if folder.name in ("", ".."):
        folder = Path(os.path.realpath(folder))  # hidden names are derived from its name
    with place(folder), disk_errors():
        if not dry_run:
            tidy(folder)
            tidy_folder(folder, {*NAMES, *COMPANIONS, files.weights}.__contains__)
        # `find_adapter` takes the first of NAMES that it finds, so another one would be loaded instead of this one.
        strangers = [name for name in NAMES if name != files.weights and (folder / name).exists()]
    if strangers:
        what = f"{folder}: holds another adapter, {strangers[0]}, which would be found in place of this one"
        raise OptionError(what, fix="choose another folder")
    suffix, weights = Path(files.weights).suffix, folder / files.weights
    _check_unshared(weights, folder / "NAME", _companion_files(stored, files))
    exists = _exists(folder, overwrite=overwrite, inside="NAME/" if files.config else f"NAME{suffix}")
    # A killed run moved the folder aside. It is restored before anything is written, and checked again then.
    if folder.exists():
        if not folder.is_dir():
            raise OptionError(f"{folder}: is a file, not a folder", fix=f"give a folder, or a file ending in {suffix}")
        for name in (files.weights, *COMPANIONS):
            _check_no_folder(folder / name)
    if dry_run:
        check_room(folder)
    elif exists:
        _write_together(stored, weights, files)
    else:
        with atomic_path(folder, folder=True, overwrite=False) as part, name_target(folder, part):
            _write_together(stored, part / files.weights, files)


@contextmanager
def name_target(target: Path, part: Path) -> Iterator[None]:
    """Let errors of the block name the target instead of the hidden file or folder that will take its place."""
    try:
        yield
    except LoraLensError as error:
        error.where = tuple(where.replace(str(part), str(target)) for where in error.where)
        raise


def write_file(stored: Stored, path: Path, *, overwrite: bool, files: Files = PEFT, dry_run: bool = False) -> None:
    """Write one file and the companion files of the dialect.

    Raises
    ------
    OptionError
        One of the files exists and ``overwrite`` is false, or its folder cannot be made.
    """
    companions = _companion_files(stored, files)
    targets = (path, *(path.with_name(name) for name in companions))
    for target in () if dry_run else targets:
        with place(target), disk_errors():
            tidy(target)
    _check_unshared(path, path.with_suffix(""), companions)
    for target in targets:
        _exists(target, overwrite=overwrite)
        _check_no_folder(target)
    check_room(path)
    if not dry_run:
        _write_together(stored, path, files)


def _check_no_folder(file: Path) -> None:
    """Refuse a folder where a file is to be written."""
    if file.is_dir():
        raise OptionError(f"{file}: is a folder, not a file", fix="choose another target")


def _check_unshared(path: Path, own_folder: Path, companions: Iterable[str]) -> None:
    """Refuse companion files that another adapter in the folder is read with: the user named only ``path``.

    ``own_folder`` is the folder that the advice names.
    """
    fix = f"give it a folder of its own: -o {quote_word(str(own_folder))}/"
    with place(path), disk_errors():
        names = sorted(file.name for file in path.parent.iterdir()) if path.parent.is_dir() else []
    for companion in companions:
        beside = path.with_name(companion)
        for name in weights_among(names):
            if name != path.name and _is_read_with(path.with_name(name), companion):
                raise OptionError(f"{beside}: {name} is read with it, and would be another adapter then", fix=fix)
        # The usual names are those of the only adapter in a folder, whose configuration may have been there first.
        if companion in names and path.name not in (*NAMES, *names) and not is_moved_aside(path):
            raise OptionError(f"{beside}: exists, and belongs to another file than {path.name}", fix=fix)


def _is_read_with(file: Path, companion: str) -> bool:
    """Whether a file holds factors that are read with a companion file, if one lies beside it."""
    try:
        container = container_of(file)
        # Without torch nobody can say what is in a pickle.
        if container == "pickle" and find_spec("torch") is None:
            return True
        # Only pickles have their record in a file.
        if container == "gguf" or (companion != CONFIG and container != "pickle"):
            return False
        if container == "pickle":
            from loralens.formats.files.torch_pickle import read_pickle  # few adapters are pickles

            return any(map(_FACTOR.search, read_pickle(file)[0]))
        return any(map(_FACTOR.search, read_safetensors(file).tensors))
    except (LoraLensError, OSError):
        return False  # nobody can read it, so nothing of it changes


def _exists(path: Path, *, overwrite: bool, inside: str = "") -> bool:
    """Whether a target exists; refuse one that does and may not be replaced. ``inside`` is advice for a folder."""
    with place(path), disk_errors():
        # What a killed run moved aside is restored before anything is written, so it counts as existing.
        exists = path.exists() or is_moved_aside(path)
        if exists and not overwrite:
            # The folder may hold several adapters. A new one then belongs in it, and does not replace it.
            other = inside and path.is_dir() and not any((path / name).exists() for name in NAMES)
            such = f", such as {quote_word(f'{path}/{inside}')}" if other else ""
            raise target_exists(such=such)
        return exists


def _companion_files(stored: Stored, files: Files) -> dict[str, bytes | None]:
    """The companion files of the weights by name; None for a file that must not exist, because it would be read."""
    companions: dict[str, bytes | None] = {}
    if files.config and not (files.optional and stored.config is None):
        companions[files.config] = None if stored.config is None else dumps(stored.config).encode("utf-8")
    if Path(files.weights).suffix == ".bin":  # a pickle has no metadata, so the record is a file of its own
        record = (stored.metadata or {}).get(RECORD)
        companions[f"{RECORD}.json"] = None if record is None else record.encode("utf-8")
    return companions


def _write_together(stored: Stored, path: Path, files: Files) -> None:
    """Write weights and their companion files; none takes its place before all of them are complete."""
    companions = _companion_files(stored, files)
    if path.suffix == ".gguf":  # which has no companions
        from loralens.formats.files.gguf_file import write_gguf  # few adapters are written as GGUF

        write_gguf(stored, path)
        return
    absent = [path.with_name(name) for name, content in companions.items() if content is None]
    with replaced_together(path, absent=absent) as put:
        for name, content in companions.items():
            if content is not None:
                with put(path.with_name(name)) as stream:
                    stream.write(content)
        (write_pickle if path.suffix == ".bin" else write_safetensors)(stored, path, put=put)


def write_pickle(stored: Stored, path: Path, *, put: Put = atomic_file) -> None:
    """Write a file of torch."""
    from loralens.formats.files.torch_pickle import write_torch  # few adapters are written as pickles

    with put(path) as stream:
        write_torch(stored.tensors, stream)
