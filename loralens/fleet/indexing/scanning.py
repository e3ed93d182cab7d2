"""Which files there are under a folder, and how they are told from those that were indexed."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR
from typing import final

from loralens.formats.files.container import CONFIG
from loralens.formats.records.collection import candidates


@final
@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that may be an adapter, or a folder that has a configuration without weights.

    Attributes
    ----------
    path : str
        Relative to the root.
    size : int
        Bytes.
    stamp : str
        Changes if the file or the configuration beside it does: their sizes and times.
    real : str
        The device and inode: equal for two paths to one file.
    """

    path: str
    size: int
    stamp: str
    real: str


def scan(root: Path, *, without: Path | None = None) -> dict[str, FoundFile]:
    """The files under ``root`` by their paths relative to it; what lies under ``without`` is left out."""
    prefix = len(str(root / "x")) - 1
    outside = f"{without}{os.sep}" if without else None
    files = {}
    for candidate in candidates(root):
        text = str(candidate)
        if outside and text.startswith(outside):
            continue
        try:
            status = os.stat(text)  # noqa: PTH116  # half the time of a Path, for thousands of files
        except OSError:
            # A link that leads nowhere; one of a cache whose download was interrupted, for example.
            continue
        name = text[prefix:] if text != str(root) else "."
        size = 0 if S_ISDIR(status.st_mode) else status.st_size
        files[name] = FoundFile(name, size, _stamp(text, status), f"{status.st_dev:x}:{status.st_ino:x}")
    return files


def count_changes(root: Path, home: Path, stamps: Mapping[str, str]) -> dict[str, int]:
    """How many files are ``new``, ``changed`` and ``gone``, compared with path → stamp; zeros are left out."""
    if not root.is_dir():
        return {"gone": len(stamps)} if stamps else {}
    real = Path(os.path.realpath(root))
    files = scan(real, without=Path(os.path.realpath(home)))
    counted = {
        "new": len(files.keys() - stamps.keys()),
        "changed": sum(stamps.get(path, file.stamp) != file.stamp for path, file in files.items()),
        "gone": len(stamps.keys() - files.keys()),
    }
    return {kind: number for kind, number in counted.items() if number}


def stamp_of(path: Path) -> str:
    """The stamp of a file now; empty if it is gone."""
    try:
        return _stamp(str(path), path.stat())
    except OSError:
        return ""


def real_of(path: Path) -> str:
    """The device and inode of a file, as in `FoundFile`; empty if there is none."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f"{status.st_dev:x}:{status.st_ino:x}"


def _stamp(path: str, status: os.stat_result) -> str:
    is_folder = S_ISDIR(status.st_mode)
    config = os.path.join(path if is_folder else os.path.dirname(path), CONFIG)  # noqa: PTH118, PTH120
    # The time of a folder changes with every file in it.
    own = "" if is_folder else _size_and_time(status)
    try:
        return f"{own} {_size_and_time(os.stat(config))}"  # noqa: PTH116
    except OSError:
        return own


def _size_and_time(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"


def short_names(paths: Iterable[str]) -> dict[str, str]:
    """Path → the name that people see: the folder of an adapter, if it holds no other one."""
    listed = list(paths)
    folders = {path: os.path.dirname(path) for path in listed}  # noqa: PTH120
    count = Counter(folders.values())
    return {path: folder if folder and count[folder] == 1 else path for path, folder in folders.items()}
