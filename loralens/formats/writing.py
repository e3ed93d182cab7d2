"""Writing to disk: a file is whole or not there, and nothing that stood there is lost before the new one is whole."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from loralens.errors import FormatError, OptionError, place
from loralens.formats.container import CONFIG, Stored, chunks, dumps

WEIGHTS = "adapter_model.safetensors"


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of ``path`` when the block ends well, and vanishes when it does not."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with place(path), _disk():
        try:
            with part.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _disk() -> Iterator[None]:
    """An OSError of the block as a message."""
    try:
        yield
    except OSError as error:
        raise FormatError(
            f"cannot be written: {error.strerror or error}",
            fix="check free space and permissions, or choose another place",
        ) from error


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


def write_folder(stored: Stored, folder: Path, *, overwrite: bool) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json`` into a folder.

    A new folder appears complete or not at all. In one that exists, other files are left alone.

    Raises
    ------
    OptionError
        The folder exists and ``overwrite`` is false, or it is a file.
    """
    if _exists(folder, overwrite=overwrite):
        if not folder.is_dir():
            what, fix = f"{folder}: is a file, not a folder", "give a folder, or a file ending in .safetensors"
            raise OptionError(what, fix=fix)
        _write_pair(stored, folder / WEIGHTS)
        return
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    with place(folder), _disk():
        try:
            part.mkdir(parents=True)
            _write_pair(stored, part / WEIGHTS)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def write_file(stored: Stored, path: Path, *, overwrite: bool) -> None:
    """Write one safetensors file, and its configuration beside it.

    Raises
    ------
    OptionError
        One of the two exists and ``overwrite`` is false, or the folder does not exist.
    """
    for target in (path, path.with_name(CONFIG)):
        _exists(target, overwrite=overwrite)
    if not path.parent.is_dir():
        raise OptionError(f"{path.parent}: no such folder", fix="make the folder first")
    _write_pair(stored, path)


def _exists(path: Path, *, overwrite: bool) -> bool:
    with place(path), _disk():
        if path.exists() and not overwrite:
            raise OptionError("exists", fix="choose another target, or give --overwrite")
        return path.exists()


def _write_pair(stored: Stored, path: Path) -> None:
    """Weights and the configuration beside them: neither takes its place before both are whole.

    A configuration that stands there is removed where the adapter has none: it would be read as the adapter's own.
    """
    beside = path.with_name(CONFIG)
    if stored.config is None:
        write_safetensors(stored, path)
        with place(beside), _disk():
            beside.unlink(missing_ok=True)
        return
    with replacing(beside) as stream:
        stream.write(dumps(stored.config).encode("utf-8"))
        write_safetensors(stored, path)
