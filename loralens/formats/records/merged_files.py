"""Telling the files that a merge wrote into a model's folder, which may be overwritten, from all other files.

The certificate of a merge lists every file that it wrote, with its size. A file that is not in this list, or that has
another size now, was written by somebody else: even ``--overwrite`` does not remove it.
"""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple, Self, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, LoraLensError, MissingFileError, OptionError, place
from loralens.formats.files.adapter_files import write_tensors
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import by_width, header_bytes, read_json, read_safetensors
from loralens.formats.files.disk import disk_errors, write_at
from loralens.formats.files.json_text import finite_number, json_or_none, json_text

KEY = "loralens_undo"
NAME = "undo.loralens"


@final
class Spool:
    """A temporary file for byte strings, which are read back as arrays. Several threads can use it.

    It is a context manager: the arrays can be read until it ends.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._end, self._lock = folder, 0, Lock()
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def keep(self, data: bytes) -> LazyArray:
        """Write the bytes, and return them as an uint8 array that is read when it is needed."""
        # Only the position is taken under the lock: threads then write their own parts at the same time.
        with disk_errors():
            with self._lock:
                if self._file is None:
                    # In the given folder: the system's folder for temporary files may be a small disk in memory.
                    self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed at the end
                file, start, self._end = self._file.fileno(), self._end, self._end + len(data)
            write_at(file, data, start)
        return LazyArray(None, shape=(len(data),), dtype=np.uint8, numbers=_KeptBytes(file, start))


@final
class _KeptBytes:
    """Bytes of a spool from their first to their last index; called by `LazyArray`, and smaller than a function."""

    __slots__ = ("_file", "_start")

    def __init__(self, file: int, start: int) -> None:
        self._file, self._start = file, start

    def __call__(self, first: int, last: int) -> Array:
        return np.frombuffer(os.pread(self._file, last - first, self._start + first), np.uint8)


Named = Iterable[tuple[str, LazyArray]]  # tensors with their keys
Content = Callable[[], Iterable[tuple[str, Any]]]  # the fields of the JSON object; an iterator of fields is an object


def write_undo(tensors: Callable[[], Named], content: Content, path: Path) -> None:
    """Write an undo file, which appears complete or not at all. ``safetensors`` does not check it."""
    with atomic_file(path) as stream:
        write_tensors(stream, by_width(tensors()), _metadata(content))


def undo_size(tensors: Callable[[], Named], content: Content) -> int:
    """The bytes of the file that `write_undo` would write; no number is read."""
    ordered = by_width(tensors())
    return len(header_bytes(ordered, _metadata(content))) + sum(tensor.nbytes for tensor in ordered.values())


def _metadata(content: Content) -> dict[str, str]:
    def as_object(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        return {name: as_object(value) if isinstance(value, Iterator) else value for name, value in fields}

    return {KEY: json_text(as_object(content()))}


def read_undo(path: Path) -> tuple[Mapping[str, LazyArray], dict[str, Any]]:
    """The tensors of an undo file, which are not read yet, and the JSON object in its metadata.

    Raises
    ------
    OptionError
        There is no such file.
    FormatError
        It is damaged, or is not an undo file.
    """
    if not path.exists():
        raise MissingFileError(
            f"{path}: no such file", fix=f"give the undo file of the merge: OUT/{NAME}, or OUT.{NAME} for one file"
        )
    stored = read_safetensors(path)
    with place(path):
        content = json_or_none((stored.metadata or {}).get(KEY))
        # A safetensors file without our key is not an undo file, and neither is one with a damaged value.
        if not isinstance(content, dict):
            raise FormatError("is not an undo file", fix=f"give the {NAME} that merge wrote")
    return stored.tensors, content


CERTIFICATE = "merge_certificate.json"
BEFORE = "before/"  # the folder for the undo file and certificate of an earlier merge, which unmerging moves back
FILES = "files"  # the key of the list of files in the certificate
# under before/, each merge of a merged model adds one level
_OWN = re.compile(rf"(?:{BEFORE})*(?:{re.escape(NAME)}|{re.escape(CERTIFICATE)})")
_SHOWN = 5  # names in a message, so that it stays readable


class MergeSettings(NamedTuple):
    """How a merge was made, as its certificate says; an attribute is None where the certificate does not say it.

    Attributes
    ----------
    bits
        ``keep`` if the merge moved codes.
    rounding
        The word that was given to ``--rounding``.
    """

    bits: str | None = None
    rounding: str | None = None
    seed: int | None = None


def _certificate(path: Path) -> dict[str, Any]:
    """The content of a certificate; empty if the file is missing or damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except (LoraLensError, OSError):
        return {}


def merge_settings(path: Path) -> MergeSettings:
    """How the merge with this certificate was made; nothing is known if the file is missing or damaged."""
    content = _certificate(path)
    rounding = content.get("rounding")
    fields = rounding if isinstance(rounding, dict) else {}
    mode, seed, bits = fields.get("mode"), fields.get("seed"), content.get("bits")
    return MergeSettings(
        bits if isinstance(bits, str) else None,
        mode if isinstance(mode, str) else None,
        seed if type(seed) is int else None,
    )


class CertifiedAdapter(NamedTuple):
    """An adapter in a certificate: the fingerprint of what was merged, and its weight."""

    fingerprint: str
    weight: float


def certified_adapters(path: Path) -> list[CertifiedAdapter]:
    """The adapters of the merge with this certificate, without damaged entries; none of a missing or damaged file."""
    listed = _certificate(path).get("adapters")
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    pairs = [(each.get("fingerprint"), finite_number(each.get("weight"))) for each in entries]
    return [CertifiedAdapter(text, weight) for text, weight in pairs if isinstance(text, str) and weight is not None]


def file_sizes(folder: Path) -> dict[str, int]:
    """The relative path, with ``/``, and the bytes of every file under a folder; links are not followed."""
    sizes = {}
    for home, inner, names in os.walk(folder):
        links = [name for name in inner if (Path(home) / name).is_symlink()]  # os.walk counts them as folders
        for name in (*names, *links):
            path = Path(home) / name
            sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return dict(sorted(sizes.items()))


def check_replaceable(target: Path, names: Collection[str]) -> None:
    """Refuse to replace a folder if a file that no merge wrote would be lost; ``names`` are the new folder's files.

    Raises
    ------
    OptionError
        The folder holds files that the new one does not have and no merge wrote. The message names them.
    """
    listed = _certificate(target / CERTIFICATE).get(FILES)
    written = listed if isinstance(listed, dict) else {}
    # A file with a new version in the new folder is replaced, and not lost.
    strange = [n for n, size in file_sizes(target).items() if n not in names and written.get(n) != size]
    # Undo files and certificates are ours, by their usual name or by their content.
    lost = [n for n in strange if not (_OWN.fullmatch(n) or is_undo(target / n) or is_certificate(target / n))]
    if lost:
        listed = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        fix = "move it elsewhere, or choose another target: --overwrite replaces the whole folder"
        raise OptionError(f"holds files that no merge wrote and the new model does not have: {listed}", fix=fix)


def is_undo(path: Path) -> bool:
    """Whether a file is an undo file."""
    try:
        return path.is_file() and KEY in (read_safetensors(path).metadata or {})
    except (LoraLensError, OSError):
        return False


def is_certificate(path: Path) -> bool:
    """Whether a file is the certificate of a merge: these keys together occur only there."""
    keys = {"loralens", "base", "result", "adapters", "modules", "total"}
    return path.suffix == ".json" and keys <= _certificate(path).keys()
