"""Files inside installed packages, found by the list of installed files. The package is never imported."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.errors import OptionError
from loralens.formats.files.relative_name import is_relative_name

if TYPE_CHECKING:  # the import takes a tenth of a second and 2 MiB, which most commands need not spend
    from importlib.metadata import Distribution

_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
# the names that transformers gives to weights, whole or in shards
_WEIGHTS = re.compile(r"(?:model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")


def is_package_name(text: str) -> bool:
    """Whether a text can be the name of a package: letters and digits, with dots, dashes and underscores between."""
    return _NAME.fullmatch(text) is not None


def is_installed(name: str) -> bool:
    """Whether a package of this name is installed. Its case, and ``-``, ``_`` or ``.`` in it, make no difference."""
    return _distribution(name) is not None


def model_folder(name: str) -> Path | None:
    """The folder of a transformers model in an installed package; None if the package or the model is not there.

    Such a folder has a ``config.json`` with weights beside it: ``model.safetensors``, ``pytorch_model.bin``, or shards.

    Raises
    ------
    OptionError
        The package holds several models.
    """
    distribution = _distribution(name)
    if distribution is None:
        return None
    files = [file for file in distribution.files or () if is_relative_name(file.as_posix())]
    configured = {file.parent for file in files if file.name == "config.json"}
    weighed = {file.parent for file in files if _WEIGHTS.fullmatch(file.name)}
    folders = sorted(Path(str(distribution.locate_file(folder))) for folder in configured & weighed)
    # The record of an installation may name files that are no longer there.
    folders = [folder for folder in folders if (folder / "config.json").is_file()]
    if len(folders) > 1:
        listed = ", ".join(str(folder) for folder in folders[:8]) + (" …" if len(folders) > 8 else "")
        raise OptionError(f"{name}: the installed package holds several models: {listed}", fix="give one of these")
    return folders[0] if folders else None


def gguf_file(name: str) -> Path | None:
    """The only GGUF file in an installed package; None if the package is not there, or has none or several."""
    distribution = _distribution(name)
    if distribution is None:
        return None
    listed = [file for file in distribution.files or () if file.suffix == ".gguf" and is_relative_name(file.as_posix())]
    paths = [Path(str(distribution.locate_file(file))) for file in listed]
    paths = [path for path in paths if path.is_file()]
    return paths[0] if len(paths) == 1 else None


def package_file(name: str, file: str) -> Path | None:
    """A file of an installed package by its path relative to ``site-packages``; None if it is not there."""
    distribution = _distribution(name)
    path = Path(str(distribution.locate_file(file))) if distribution else None
    return path if path and path.is_file() else None


def _distribution(name: str) -> "Distribution | None":
    if not is_package_name(name) or not _may_be_installed(name):
        return None
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _may_be_installed(name: str) -> bool:
    """Whether some folder of packages has an entry that begins with this name; if not, no such package is installed.

    An adapter often names its base by a word that is no package, and this takes less than asking `importlib`.
    """
    begin = f"{_normal(name)}-"  # "-1.0.dist-info", or ".egg-info" of older tools
    for folder in map(Path, sys.path):
        # An egg and a zip file are packages themselves.
        if folder.suffix == ".egg" or folder.is_file():
            return True
        with suppress(OSError):
            if any(_normal(entry.name).startswith(begin) for entry in folder.iterdir()):
                return True
    return False


def _normal(name: str) -> str:
    """A name in which case, and ``-``, ``_`` and ``.``, make no difference (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
