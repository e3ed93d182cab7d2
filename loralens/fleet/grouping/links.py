"""Links in a fleet: several paths to one file, and files that must stay because of a link."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from loralens.fleet.catalogue.members import Member
from loralens.fleet.sketching.sketches import Sketches
from loralens.formats.files.outside import folders


def link_targets(root: Path, paths: Sequence[Path]) -> Mapping[Path, str]:
    """The paths that must stay because of links, each with the reason in words.

    A path stays if a link under ``root`` leads to it or to a folder above it, and if it is a link itself, because its
    deletion would free nothing. A link to ``root`` itself or to a folder above it says nothing about single adapters.
    Links elsewhere on the machine cannot be known.
    """
    targets: dict[str, str] = {}
    home = Path(os.path.realpath(root))
    for folder, files in folders(root, without=lambda _: False):
        for name in files:
            link = folder / name
            # A link that may not be followed leads to no file that this user could delete.
            with suppress(OSError):
                if link.is_symlink() and not home.is_relative_to(target := os.path.realpath(link)):
                    targets.setdefault(target, str(link.relative_to(root)))
    reasons = {}
    for path in paths:
        # A link may lead to the file or to a folder above it.
        real = os.path.realpath(path)
        while real not in targets and real != os.path.dirname(real):  # noqa: PTH120
            real = os.path.dirname(real)  # noqa: PTH120
        if real in targets:
            own = os.path.relpath(path, root)
            reasons[path] = "is a link" if targets[real] == own else f"{targets[real]} links to it"
    return reasons


def distinct_files(members: Sequence[Member], sketches: Sketches) -> tuple[Sequence[Member], Sketches]:
    """The members and their sketches without further paths to a file that another member has already.

    Groups would otherwise count a file twice that is reached through a link.
    """
    files = paths_by_file(members)
    if len(files) == len(members):
        return members, sketches
    rows = np.array(sorted(paths[0] for paths in files))
    return [members[row] for row in rows], sketches.take(rows)


def paths_by_file(members: Sequence[Member]) -> list[list[int]]:
    """The rows of each file: the path without links first."""
    by_file: dict[str, list[int]] = {}
    for row, member in enumerate(members):
        by_file.setdefault(member.real, []).append(row)
    # Only files with several paths need a look at the disk.
    return [
        rows if len(rows) == 1 else sorted(rows, key=lambda row: (members[row].path.is_symlink(), members[row].name))
        for rows in by_file.values()
    ]
