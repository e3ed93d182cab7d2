"""Replacing several files that belong together, such as weights and their configuration.

The scale of an adapter may be in another file than its factors. New factors with an old configuration would be another
update, and would load without an error. So all files are first written completely under hidden names, and there are no
weights while the files are replaced: the old ones are moved aside first, and the new ones come last. If a run is killed
in between, the next one restores the old files.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self, final

from loralens.errors import place
from loralens.formats.files.disk import disk_errors, flush, sync, sync_folder
from loralens.formats.files.leftovers import COMPANIONS, NONE, keep_mode, reserve, restore_pair, tidy


@final
class Staging:
    """Files that are written one after the other and then take their places together.

    It is a context manager: files that were not placed are removed at its end.

    Parameters
    ----------
    weights : Path
        The weights. Without this file the others are not an adapter.
    """

    def __init__(self, weights: Path) -> None:
        self._weights = weights
        self._parts: dict[Path, Path] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextmanager
    def put(self, path: Path) -> Iterator[BinaryIO]:
        """Give a stream for the file that will be at ``path``. Errors are those of `atomic_file`."""
        with place(path), disk_errors():
            tidy(path)
            part = self._stack.enter_context(reserve(path))
            with part.open("wb") as stream:
                yield stream
                flush(stream)
        self._parts[path] = part

    def place(self, *, absent: Sequence[Path] = ()) -> None:
        """Move every file to its place, the weights last; files at ``absent`` are removed."""
        weights = self._weights
        companions = {path: part for path, part in self._parts.items() if path != weights}
        with place(weights), disk_errors(), ExitStack() as stack:
            for path, part in self._parts.items():
                keep_mode(path, part)
            # Weights alone are replaced by one rename, which needs no preparation.
            if os.path.lexists(weights) and (companions or absent):
                pair = stack.enter_context(reserve(weights, folder=True, end="pair"))
                # If anything below fails, this restores the old files. Otherwise it finds the new weights and only
                # removes the old ones.
                stack.callback(restore_pair, pair, weights)
                # The companions are replaced while the weights are away, so a killed run needs copies of them.
                _remember([*companions, *absent], pair)
                weights.rename(pair / weights.name)
            for path, part in companions.items():
                part.replace(path)
            # If the new adapter has no configuration, an old one would be taken for its own.
            for path in absent:
                path.unlink(missing_ok=True)
            # Last: from here on the new adapter can be loaded.
            self._parts[weights].replace(weights)
            sync_folder(weights.parent)


def _remember(files: Sequence[Path], pair: Path) -> None:
    """Copy the files beside the weights into ``pair``, and leave a mark for each that does not exist."""
    for path in files:
        assert path.name in COMPANIONS
        if os.path.lexists(path):
            shutil.copy2(path, pair / path.name, follow_symlinks=False)
        else:
            (pair / f"{path.name}{NONE}").touch()
    sync(pair)
