"""Which files there are under a folder, and how they are told from those that were indexed."""

import errno
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from stat import S_ISDIR
from typing import final

from loralens.errors import FormatError
from loralens.fleet.catalogue.members import UNREACHABLE
from loralens.formats.files.container import CONFIG
from loralens.formats.records.collection import candidate_paths

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


@final
@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file that may be an adapter, a folder that has a configuration without weights, or what cannot be reached.

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
    reason : str
        Why a folder cannot be listed, or a file not be reached; empty for everything else.
    """

    path: str
    size: int
    stamp: str
    real: str
    reason: str = ""


def scan(
    root: Path, *, without: Path | None = None, linked: Callable[[Path], object] | None = None
) -> dict[str, FoundFile]:
    """The files under ``root`` by their paths relative to it; what lies under ``without`` is left out.

    ``linked`` receives every link to a folder.

    A folder that cannot be listed is among them, with the reason. What it holds is unknown, which is another thing than
    that it holds nothing.

    Raises
    ------
    FormatError
        ``root`` itself cannot be listed.
    """
    prefix = len(os.path.join(root, "x")) - 1  # noqa: PTH118
    outside = f"{without}{os.sep}" if without else None
    unlisted: dict[Path, OSError] = {}
    files = {}
    for text in candidate_paths(root, failed=unlisted.setdefault, linked=linked):
        if outside and text.startswith(outside):
            continue
        name = text[prefix:] if text != str(root) else "."
        try:
            status = os.stat(text)  # noqa: PTH116  # half the time of a Path, for thousands of files
        except OSError as error:
            # A link that leads nowhere; one of a cache whose download was interrupted, for example.
            if error.errno in _ABSENT:
                continue
            files[name] = _unreachable(name, f"cannot be reached: {error.strerror}")
            continue
        size = 0 if S_ISDIR(status.st_mode) else status.st_size
        files[name] = FoundFile(name, size, _stamp(text, status), f"{status.st_dev:x}:{status.st_ino:x}")
    for folder, refused in unlisted.items():
        if folder == root:
            fix = "give yourself the right to read it, or mount its disk"
            raise FormatError(f"{root}: cannot be listed: {refused.strerror}", fix=fix) from refused
        # What was removed meanwhile is gone.
        if refused.errno not in _ABSENT:
            name = str(folder.relative_to(root))
            files[name] = _unreachable(name, f"this folder cannot be listed: {refused.strerror}")
    return files


def _unreachable(name: str, reason: str) -> FoundFile:
    return FoundFile(name, 0, UNREACHABLE, "", reason)


def look_through(
    root: Path, home: Path, known: Collection[str], linked: Callable[[Path], object] | None = None
) -> tuple[dict[str, FoundFile], set[str]]:
    """The files under a folder, and those of the known paths that may still be there although they were not found.

    These lie below a folder that cannot be listed, or below a link that leads nowhere, as one does whose disk is not
    mounted. Such folders and links are among the files, with the reason. ``linked`` receives every link to a folder.
    """
    files = scan(root, without=home, linked=linked)
    missing = {path for path in known if path not in files}
    files |= _broken_links(root, missing)
    unreachable = {path for path, file in files.items() if file.reason}
    return files, {path for path in missing if not unreachable.isdisjoint(map(str, PurePath(path).parents))}


def _broken_links(root: Path, missing: Iterable[str]) -> dict[str, FoundFile]:
    """The links above missing files that lead nowhere."""
    links: dict[str, FoundFile] = {}
    leads_on: dict[str, bool] = {}
    for path in missing:
        name = ""
        # From the top, since an index from elsewhere may have paths of thousands of folders that were never there.
        for part in path.split(os.sep)[:-1]:  # noqa: PTH206
            name = f"{name}{os.sep}{part}" if name else part
            if name not in leads_on:
                place = f"{root}{os.sep}{name}"
                # The methods of Path are not used, as they raise an error where a permission is missing.
                leads_on[name] = os.path.exists(place)  # noqa: PTH110
                if not leads_on[name] and os.path.islink(place):  # noqa: PTH114
                    reason = f"this link leads to a folder that is not there: {os.readlink(place)}"  # noqa: PTH115
                    links[name] = _unreachable(name, reason)
            if not leads_on[name]:
                break
    return links


def count_changes(root: Path, home: Path, stamps: Mapping[str, str]) -> dict[str, int]:
    """How many files are ``new``, ``changed`` and ``gone``, compared with path → stamp; zeros are left out."""
    if not os.path.isdir(root):  # noqa: PTH112  # a Path raises an error for a text that no path can be
        return {"gone": len(stamps)} if stamps else {}
    files, hidden = look_through(Path(os.path.realpath(root)), Path(os.path.realpath(home)), stamps.keys())
    counted = {
        "new": len(files.keys() - stamps.keys()),
        "changed": sum(not file.reason and stamps.get(path, file.stamp) != file.stamp for path, file in files.items()),
        "gone": len(stamps.keys() - files.keys() - hidden),
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
