"""Writing one file, which takes the place of an older one only when it is complete."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import BinaryIO

from loralens.errors import place
from loralens.formats.files.disk import disk, flush
from loralens.formats.files.leftovers import reserve, tidy

Put = Callable[[Path], AbstractContextManager[BinaryIO]]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Give a stream whose file takes the place of ``path`` when the block succeeds and is removed otherwise.

    An OSError of the block becomes a FormatError that names ``path``; other errors pass unchanged. What killed runs
    left of the same file is removed.
    """
    with place(path), disk():
        tidy(path)
        with reserve(path) as part:
            with part.open("wb") as stream:
                yield stream
                flush(stream)
            part.replace(path)
