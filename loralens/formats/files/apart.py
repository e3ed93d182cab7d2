"""Targets apart from inputs: what a command reads, it neither writes to, nor replaces, nor removes."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from loralens.errors import OptionError, place
from loralens.formats.files.location import adapter_file, config_beside, existing

Input = tuple[str, Path]  # in words, "the base", and where it is
_FIX = "choose a target outside: what is read is never written to"


def adapter_inputs(path: str) -> Iterator[Input]:
    """Where an adapter is: what was given, the file in it, and the configuration beside that."""
    what = f"the adapter {path}"
    yield what, existing(Path(path))
    file = adapter_file(Path(path))
    yield what, file
    config = config_beside(file)
    if config:
        yield f"the configuration of {path}", config


def check_apart(target: Path, inputs: Iterable[Input], *, within: bool = True) -> None:
    """Refuse a target that is an input or holds one; or lies in one, where ``within`` is true.

    Links are followed on both sides.

    Raises
    ------
    OptionError
        It says which input, and how they lie to each other.
    """
    target_path = Path(os.path.realpath(target))
    with place(target):
        for what, path in inputs:
            for input_path in {Path(os.path.realpath(path)), Path(os.path.realpath(path.parent)) / path.name}:
                if _is_same_place(target_path, input_path):
                    raise OptionError(f"is {what} itself", fix=_FIX)
                if any(_is_same_place(target_path, folder) for folder in input_path.parents):
                    raise OptionError(f"holds {what}", fix=_FIX)
                if within and any(_is_same_place(folder, input_path) for folder in target_path.parents):
                    raise OptionError(f"lies within {what}", fix=_FIX)


def _is_same_place(first: Path, second: Path) -> bool:
    """Whether two paths are one place, where the system does not tell cases apart or mounts a folder twice too."""
    if first == second:
        return True
    try:
        return first.samefile(second) and (first.is_dir() or first.parent.samefile(second.parent))
    except OSError:
        return False
