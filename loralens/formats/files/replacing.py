"""One file that takes the place of another when it is whole, and not before."""

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
    """A file to write that takes the place of ``path`` when the block ends well, and vanishes when it does not.

    An OSError of the block becomes a message that names ``path``; other errors pass as they are. What killed runs left
    of the same file is removed.
    """
    with place(path), disk():
        tidy(path)
        with reserve(path) as part:
            with part.open("wb") as stream:
                yield stream
                flush(stream)
            part.replace(path)
