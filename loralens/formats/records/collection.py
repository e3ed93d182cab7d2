"""The adapters under a folder, found by their names and told from models by their headers."""

import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, final

from loralens.core.adapter import Adapter
from loralens.errors import LoraLensError, OptionError
from loralens.formats import FORMATS, load
from loralens.formats.files.container import CONFIG, OpenFile, read_safetensors
from loralens.formats.files.gguf.header import Header, counts, values
from loralens.formats.files.location import SUFFIXES, is_gguf, is_pickle
from loralens.formats.files.walking import folders

NO_ADAPTERS = ("optimizer*", "scheduler*", "rng_state*", "training_args*", "scaler*", "pytorch_model*", "*.index.json")

Status = Literal["adapter", "unreadable", "other"]


@final
@dataclass(frozen=True, slots=True)
class Found:
    """What stands at one path.

    Attributes
    ----------
    path : Path
        The file, or the folder whose configuration has no weights beside it.
    adapter : Adapter or None
        Its numbers unread.
    size : int
        Bytes on disk; 0 for a folder.
    status : str
        ``adapter``; ``unreadable``: it should be one; ``other``: a model's weights, or another tensor file.
    reason, fix : str
        Why it is not an adapter, in words.
    """

    path: Path
    adapter: Adapter | None
    size: int
    status: Status
    reason: str = ""
    fix: str = ""


def candidates(root: Path) -> list[Path]:
    """Tensor files under a folder, and folders whose adapter_config.json has none beside it, in order of paths.

    Hidden folders are left out, and what training tools leave beside an adapter: optimizer states, random states.
    Links to folders are followed, each folder once, by its own path where it has one under ``root``; but none that
    leads to a folder around ``root``.

    Raises
    ------
    OptionError
        ``root`` is no folder.
    """
    if not root.is_dir():
        raise OptionError(f"{root}: is no folder", fix="give the folder to look through")
    return sorted(_walk(root), key=lambda path: path.parts)


def _walk(root: Path) -> Iterator[Path]:
    home = os.path.realpath(root)
    visited: set[tuple[int, int]] = set()  # by number: a real path asks the system about every folder above, each time
    waiting = deque([root])
    while waiting:
        start = waiting.popleft()
        if start != root and _contains(os.path.realpath(start), home):
            continue
        for folder, files in folders(start, without=lambda name: name.startswith(".")):
            try:
                status = folder.stat()
            except OSError:  # it has gone meanwhile
                continue
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            links = [name for name in files if not name.startswith(".") and (folder / name).is_dir()]
            waiting += [folder / name for name in links]
            yield from _in_folder(folder, [name for name in files if name not in links])


def _contains(folder: str, inside: str) -> bool:
    """Whether one folder is another, or lies around it."""
    return os.path.commonpath([folder, inside]) == folder


def _in_folder(folder: Path, files: Sequence[str]) -> Iterator[Path]:
    """The candidates among the files of a folder."""
    tensors = [name for name in files if Path(name).suffix in SUFFIXES and not name.startswith(".")]
    yield from (folder / name for name in tensors if not any(fnmatchcase(name, glob) for glob in NO_ADAPTERS))
    if CONFIG in files and not tensors:
        yield folder


def examine(path: Path, *, allow_pickle: bool = False, once: bool = False) -> Found:
    """What stands at a candidate's path, by its header; no number is read, but for pickles. Raises nothing."""
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError:
        size = 0
    try:
        return Found(path, load(path, allow_pickle=allow_pickle, once=once, strict=False), size, "adapter")
    except LoraLensError as error:
        status: Status = "other" if _is_model(path) else "unreadable"
        reason = "holds tensors, and no LoRA pairs" if status == "other" else error.what
        return Found(path, None, size, status, reason, "" if status == "other" else error.fix)


def _is_model(path: Path) -> bool:
    """Whether a file that is no adapter is sound all the same, and nothing beside it says that it should be one."""
    try:
        if path.is_dir() or (path.parent / CONFIG).exists() or is_pickle(path):
            return False
        if is_gguf(path):
            return _gguf_type(path) != "adapter"
        stored = read_safetensors(path)
    except (LoraLensError, OSError):
        return False
    return not any(form.detect(stored) for form in FORMATS)


def _gguf_type(path: Path) -> object:
    """What the header of a GGUF file says it is, as far as it can be read; files older than that key say nothing."""
    with suppress(LoraLensError):
        header = Header(OpenFile(path))
        for key, value in values(header, counts(header)[1]):
            if key == "general.type":
                return value.value
    return None
