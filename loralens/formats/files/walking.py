"""Walking through folders of unknown origin, however deeply they are nested."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Listing(NamedTuple):
    """The path of a folder, the names of its files, links and pipes, and which of them are links; all sorted."""

    folder: str
    files: list[str]
    links: list[str]


def folders(
    root: Path,
    *,
    follow: bool = False,
    without: Callable[[str], bool],
    failed: Callable[[Path, OSError], object] | None = None,
) -> Iterator[tuple[Path, list[str]]]:
    """Every folder from ``root`` down, and the names of its files, links and pipes; parameters as in `listings`."""
    found = listings(root, follow=follow, without=without, failed=failed)
    return ((Path(listing.folder), listing.files) for listing in found)


def listings(
    root: Path,
    *,
    follow: bool = False,
    without: Callable[[str], bool],
    failed: Callable[[Path, OSError], object] | None = None,
) -> Iterator[Listing]:
    """Every folder from ``root`` down, and what it holds besides folders.

    `os.walk` of Python 3.11 is recursive and fails on a thousand nested folders.

    Parameters
    ----------
    root : Path
    follow : bool
        Follow links to folders too. A folder that is its own ancestor is left out, so that a loop ends.
    without : callable
        Takes the name of a folder, and returns whether the folder is left out.
    failed : callable, optional
        Takes a folder that cannot be listed, and the error. Such folders are left out.
    """
    # Texts, since joining two Paths takes ten times as long, and a collection has thousands of folders.
    pending = [(str(root), frozenset[tuple[int, int]]())]
    while pending:
        folder, ancestors = pending.pop()
        files: list[str] = []
        links: list[str] = []
        inner: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    is_folder = _is_folder(entry, follow=follow)
                    (inner if is_folder else files).append(entry.name)
                    if not is_folder and entry.is_symlink():
                        links.append(entry.name)
            status = os.stat(folder) if follow else None  # noqa: PTH116
        except OSError as error:
            # Permissions do not allow reading it, or its path is too long for the system.
            if failed:
                failed(Path(folder), error)
            continue
        number = (status.st_dev, status.st_ino) if status else None
        # a link to a folder above, which would never end
        if number in ancestors:
            continue
        yield Listing(folder, sorted(files), sorted(links))
        inner_ancestors = ancestors | {number} if number else ancestors
        chosen = [name for name in sorted(inner, reverse=True) if not without(name)]
        pending += [(os.path.join(folder, name), inner_ancestors) for name in chosen]  # noqa: PTH118


def _is_folder(entry: os.DirEntry[str], *, follow: bool) -> bool:
    try:
        return entry.is_dir(follow_symlinks=follow)
    except OSError:
        return False
