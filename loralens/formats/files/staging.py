"""Staging: weights and what stands beside them, whole under hidden names before any of them takes its place.

The scale of an adapter may stand in another file than its factors. New factors under an old configuration would be
another update, and would load without an error. So while several files are replaced, there are no weights: the old ones
are moved aside first, and the new ones come last. A run that is killed in between is put right by the next one.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO, Self, final

from loralens.errors import place
from loralens.formats.files.disk import disk, flush, sync, sync_folder
from loralens.formats.files.leftovers import COMPANIONS, NONE, put_back, reserve, tidy


@final
class Staging:
    """Files that are written one after the other and given their places together.

    A context: what was not placed vanishes with it.

    Parameters
    ----------
    weights : Path
        The file that makes an adapter of all of them.
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
        """A file to write that will be at ``path``. Errors as those of `replacing`."""
        with place(path), disk():
            tidy(path)
            part = self._stack.enter_context(reserve(path))
            with part.open("wb") as stream:
                yield stream
                flush(stream)
        self._parts[path] = part

    def place(self, *, absent: Sequence[Path] = ()) -> None:
        """Give every file its place, the weights last; files at ``absent`` are removed."""
        weights = self._weights
        companions = {path: part for path, part in self._parts.items() if path != weights}
        with place(weights), disk(), ExitStack() as stack:
            if os.path.lexists(weights) and (companions or absent):
                pair = stack.enter_context(reserve(weights, folder=True, end="pair"))
                stack.callback(put_back, pair, weights)  # where what follows fails; else it finds the new weights
                _remember([*companions, *absent], pair)
                weights.rename(pair / weights.name)
            for path, part in companions.items():
                part.replace(path)
            for path in absent:
                path.unlink(missing_ok=True)
            self._parts[weights].replace(weights)
            sync_folder(weights.parent)


def _remember(files: Sequence[Path], pair: Path) -> None:
    """Copies of what stands beside the weights, and a mark where nothing does."""
    for path in files:
        assert path.name in COMPANIONS
        if os.path.lexists(path):
            shutil.copy2(path, pair / path.name, follow_symlinks=False)
        else:
            (pair / f"{path.name}{NONE}").touch()
    sync(pair)
