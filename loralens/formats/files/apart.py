"""Checks that the target of a command is not one of its inputs: what is read is never written to or replaced."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from loralens.errors import OptionError, place
from loralens.formats.files.location import adapter_file, config_beside, existing_path

Input = tuple[str, Path]  # what it is in words, such as "the base", and its path
_FIX = "choose a target outside the inputs: what is read is never written to"


def adapter_inputs(path: str) -> Iterator[Input]:
    """The paths that belong to an adapter: the given one, the weights' file, and the configuration beside it."""
    what = f"the adapter {path}"
    # A Hub id or a package is read in the cache or in site-packages, so the given text is not the path that counts.
    yield what, existing_path(Path(path))
    file = adapter_file(Path(path))
    yield what, file
    config = config_beside(file)
    if config:
        yield f"the configuration of {path}", config


def check_apart(target: Path, inputs: Iterable[Input], *, within: bool = True) -> None:
    """Refuse a target that is an input, contains one, or (with ``within``) lies inside one.

    Links are followed on both sides.

    Raises
    ------
    OptionError
        The message names the input and how the two paths overlap.
    """
    target_path = Path(os.path.realpath(target))
    with place(target):
        for what, path in inputs:
            # The input may be a link itself. Then both matter: the link, which must not be replaced, and its other end.
            for input_path in {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}:
                if _is_same_place(target_path, input_path):
                    raise OptionError(f"is {what} itself", fix=_FIX)
                if any(_is_same_place(target_path, folder) for folder in input_path.parents):
                    raise OptionError(f"holds {what}", fix=_FIX)
                if within and any(_is_same_place(folder, input_path) for folder in target_path.parents):
                    raise OptionError(f"lies within {what}", fix=_FIX)


def _is_same_place(first: Path, second: Path) -> bool:
    """Whether two paths are the same place.

    This also holds on a file system that ignores case, and for a folder that is mounted twice.
    """
    if first == second:
        return True
    try:
        # Two hard links are one file with two names. Replacing one name does not change the other, so a file is the
        # same place only if its folder is the same too.
        return first.samefile(second) and (first.is_dir() or first.parent.samefile(second.parent))
    except OSError:
        return False
