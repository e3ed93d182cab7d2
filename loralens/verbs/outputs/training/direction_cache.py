"""The leading directions of weights in the user's cache folder, from which runs start with PiSSA."""

from typing import final

from loralens.core.messages import warn
from loralens.errors import FormatError
from loralens.formats.records.cache import LIMIT, SvdCache, default_folder
from loralens.linalg.rank_update import Decomposed
from loralens.tables.numbers import parse_size
from loralens.training.initialisation import TruncatedSvd


@final
class DirectionCache:
    """Reads and writes directions in the folder in which the SVDs of base weights are kept too."""

    def __init__(self) -> None:
        self._cache: SvdCache | None = SvdCache(default_folder(), limit=parse_size(LIMIT))

    def read(self, key: str, shape: tuple[int, int], rank: int) -> TruncatedSvd | None:
        """The directions under a key; None if there are none, or their file is damaged."""
        svd = self._cache.read(key, shape, rank) if self._cache else None
        return None if svd is None else TruncatedSvd(*svd)

    def write(self, key: str, directions: TruncatedSvd) -> None:
        """Keep directions, if the disk allows it."""
        if self._cache is None:
            return
        try:
            self._cache.write(key, Decomposed(*directions))
        except FormatError as error:
            error.at("the directions are not kept")
            warn(": ".join((*error.where, error.what)), error.fix)
            self._cache = None
