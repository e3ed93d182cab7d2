"""Whether a verb was given several adapters, and the table of the verbs that take several."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from loralens.core.adapter import Adapter
from loralens.errors import LoraLensError
from loralens.formats.files.location import file_in_folder
from loralens.verbs.inputs.adapters import AdapterSource, Source

if TYPE_CHECKING:
    from loralens.verbs.batches.batch_task import AdapterWork

# Verb → what makes its work. A verb enters itself when its module is imported.
WORK: "dict[str, Callable[[], AdapterWork]]" = {}


def is_several(source: Source) -> bool:
    """Whether a verb was given several adapters: a list, or a folder that is not an adapter itself but holds some."""
    if isinstance(source, list | tuple):
        return True
    # A sequence of another type is refused later, because it is not an adapter.
    return not isinstance(source, Adapter) and isinstance(source, str | os.PathLike) and is_collection(Path(source))


def is_collection(path: Path) -> bool:
    """Whether a path is a folder that is not an adapter itself, and there are tensor files under it."""
    try:
        if not path.is_dir():
            return False
        # A damaged file does not make the folder of one adapter a collection.
        file_in_folder(path)
    except (LoraLensError, OSError):
        # Imported here, as the folder of an adapter needs no search.
        from loralens.formats.records.collection import candidates

        # An empty folder is not a collection. The verb itself reports what is missing, as for every path.
        return path.is_dir() and bool(candidates(path))
    return False


def one_adapter(source: Source) -> AdapterSource:
    """The adapter that a verb was given; several have been taken by `in_batches`."""
    assert not isinstance(source, list | tuple)
    return cast("AdapterSource", source)
