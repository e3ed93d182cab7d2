"""Writing to disk: a file is whole or not there, and nothing that stood there is lost before the new one is whole."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from loralens.errors import FormatError, OptionError, place
from loralens.formats.container import PEFT, RECORD, Files, Stored, chunks, dumps
from loralens.formats.location import NAMES, SUFFIXES


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    An OSError of the block becomes a message that names ``path``; other errors pass as they are.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with disk(path):
        try:
            with part.open("wb") as stream:
                yield stream
                _flush(stream)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _flush(stream: BinaryIO) -> None:
    """Wait until what was written is on the disk, or the disk has refused it."""
    stream.flush()
    os.fsync(stream.fileno())


@contextmanager
def disk(path: Path | None = None) -> Iterator[None]:
    """An OSError of the block as a message, which names ``path`` where one is given."""
    try:
        yield
    except OSError as error:
        refused = FormatError(
            f"cannot be written: {error.strerror or error}",
            fix="check free space and permissions, or choose another place",
        )
        raise (refused.at(str(path)) if path else refused) from error


def write_safetensors(stored: Stored, path: Path) -> None:
    """Write tensors and metadata, one tensor at a time; same input, same bytes.

    Before it takes its place, the file is opened by the reference implementation of the format.
    """
    from safetensors import SafetensorError, safe_open

    with replacing(path) as stream:
        for chunk in chunks(stored.tensors, stored.metadata):
            stream.write(chunk)
        stream.flush()
        try:
            with safe_open(stream.name, framework="numpy") as check:
                assert set(check.keys()) == set(stored.tensors)
        except SafetensorError as error:
            raise FormatError(
                f"safetensors cannot read what was written ({error})", fix="report this as a bug"
            ) from error


def write_files(stored: Stored, path: Path, *, files: Files, overwrite: bool, dry_run: bool = False) -> None:
    """Write into a folder, or to the file that ``path`` names by its suffix; a dry run refuses what that would."""
    suffix = Path(files.weights).suffix
    if path.suffix in SUFFIXES and path.suffix != suffix:
        raise OptionError(
            f"{path}: this format is not written to {path.suffix} files",
            fix=f"give a folder, or a file ending in {suffix}",
        )
    if not dry_run:
        write = write_file if path.suffix == suffix else write_folder
        write(stored, path, files=files, overwrite=overwrite)
        return
    if path.suffix == suffix:
        _check_file(stored, path, files, overwrite=overwrite)
    else:
        _check_folder(path, files, overwrite=overwrite)
    check_room(path)


def write_folder(stored: Stored, folder: Path, *, overwrite: bool, files: Files = PEFT) -> None:
    """Write the files of a dialect into a folder.

    A new folder appears complete or not at all. In one that exists, other files are left alone.

    Raises
    ------
    OptionError
        The folder exists and ``overwrite`` is false, or holds an adapter of another dialect, or is a file.
    """
    if _check_folder(folder, files, overwrite=overwrite):
        _write_together(stored, folder / files.weights, files)
        return
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with place(folder), disk():
        try:
            part.mkdir(parents=True)
            _write_together(stored, part / files.weights, files)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_file(stored: Stored, path: Path, *, overwrite: bool, files: Files = PEFT) -> None:
    """Write one file, and what the dialect keeps beside it.

    Raises
    ------
    OptionError
        One of the files exists and ``overwrite`` is false, or the folder does not exist.
    """
    _check_file(stored, path, files, overwrite=overwrite)
    _write_together(stored, path, files)


def _check_folder(folder: Path, files: Files, *, overwrite: bool) -> bool:
    """Whether a folder is there; refuse one that cannot be written into."""
    if not _exists(folder, overwrite=overwrite):
        return False
    if not folder.is_dir():
        fix = f"give a folder, or a file ending in {Path(files.weights).suffix}"
        raise OptionError(f"{folder}: is a file, not a folder", fix=fix)
    strangers = [name for name in NAMES if name != files.weights and (folder / name).exists()]
    if strangers:
        what = f"{folder}: holds another adapter, {strangers[0]}, which would be found in place of this one"
        raise OptionError(what, fix="choose another folder")
    return True


def _check_file(stored: Stored, path: Path, files: Files, *, overwrite: bool) -> None:
    """Refuse a file that is there, or has no folder; what stands beside it counts too."""
    for target in (path, *(path.with_name(name) for name in _beside(stored, files))):
        _exists(target, overwrite=overwrite)
    check_parent(path)


def check_parent(path: Path) -> None:
    """Refuse a file whose folder is not there."""
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent}: no such folder", fix="make the folder first")


def check_room(path: Path) -> None:
    """Refuse a place under a file, or in a folder that may not be written to: what a dry run can know of the disk."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if not there.is_dir():
        raise OptionError(f"{there}: is a file, not a folder", fix="choose another target")
    if not os.access(there, os.W_OK):
        raise OptionError(f"{there}: may not be written to", fix="choose another target, or change its permissions")


def _exists(path: Path, *, overwrite: bool) -> bool:
    with place(path), disk():
        if path.exists() and not overwrite:
            raise OptionError("exists", fix="choose another target, or give --overwrite")
        return path.exists()


def _beside(stored: Stored, files: Files) -> dict[str, bytes | None]:
    """What stands beside the weights, by name; None: nothing may stand there, it would be read as theirs."""
    beside: dict[str, bytes | None] = {}
    if files.config and not (files.optional and stored.config is None):
        beside[files.config] = None if stored.config is None else dumps(stored.config).encode("utf-8")
    if Path(files.weights).suffix == ".bin":  # a pickle has no metadata
        record = (stored.metadata or {}).get(RECORD)
        beside[f"{RECORD}.json"] = None if record is None else record.encode("utf-8")
    return beside


def _write_together(stored: Stored, path: Path, files: Files) -> None:
    """Weights and what stands beside them: nothing takes its place before all of it is whole."""
    beside = _beside(stored, files)
    with ExitStack() as stack:
        for name, content in beside.items():
            if content is not None:
                stream = stack.enter_context(replacing(path.with_name(name)))
                stream.write(content)
                _flush(stream)  # on the disk before the weights, which take their place first
        _writer(path)(stored, path)
    for name, content in beside.items():
        if content is None:
            with place(path.with_name(name)), disk():
                path.with_name(name).unlink(missing_ok=True)


def _writer(path: Path) -> Callable[[Stored, Path], None]:
    if path.suffix == ".gguf":
        from loralens.formats.gguf_container import write_gguf

        return write_gguf
    return write_pickle if path.suffix == ".bin" else write_safetensors


def write_pickle(stored: Stored, path: Path) -> None:
    """Write tensors as ``torch.save`` would, without torch."""
    from loralens.formats.torch_writer import pickle_bytes

    with replacing(path) as stream:
        for chunk in pickle_bytes(stored.tensors):
            stream.write(chunk)
