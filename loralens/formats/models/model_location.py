"""Where a base model is stored: its file, its folder, or the parts of its GGUF file.

Every verb that writes an adapter checks these paths too, so this module imports no reader of models.
"""

import re
from pathlib import Path

from loralens.errors import FormatError, OptionError
from loralens.formats.files.location import existing_path, is_gguf, snapshot
from loralens.formats.files.packages import is_package_name

SUFFIX = ".gguf"
# The parts that llama.cpp's gguf-split writes.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
# Many models come with an image projector file (mmproj), which is a separate model.
_PROJECTOR = "mmproj"
_SHOWN = 6  # most names that a message lists


def resolve_path(path: Path) -> Path:
    """The file or folder of the model; for a ``models--org--name`` folder of the Hub cache, that of its snapshot."""
    path = model_path(path)
    # A path without snapshots is not a folder of the cache.
    if not (path / "snapshots").is_dir():
        return path
    chosen = snapshot(path)
    if not chosen:
        names = ", ".join(sorted(p.name for p in (path / "snapshots").iterdir())[:6]) or "none"
        what = f"{path}: refs/main points to none of its snapshots ({names})"
        raise OptionError(what, fix="give the folder of one snapshot, or download the model again")
    return chosen


def model_path(path: Path) -> Path:
    """The file or folder of a model. For the name of a package with a GGUF model, its `float_folder`.

    Raises
    ------
    OptionError, FormatError
        As for `existing_path`; transformers is not installed; the folder cannot be written.
    """
    existing = existing_path(path)
    # An existing path is used as it is, even if it names the GGUF file of a package.
    if path.exists() or existing.is_dir() or not is_package_name(path.as_posix()):
        return existing
    # Imported here because it imports the readers and writers of models, which other calls do not need.
    from loralens.formats.models.float_folder import float_folder

    return float_folder(path.as_posix(), gguf_paths(existing))


def gguf_paths(path: Path) -> tuple[Path, ...]:
    """The files of the GGUF model at a path: the file itself, all parts of a split one, or those in a folder.

    Empty if the path is not a GGUF model. GGUF files are ignored in a folder that also has safetensors weights.

    Raises
    ------
    FormatError
        A part is missing, or a folder holds several models.
    """
    if path.is_file():
        match = _PART.fullmatch(path.name) if is_gguf(path) else None
        return _parts(path.parent, match) if match else (path,) if is_gguf(path) else ()
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return ()
    files = sorted(p for p in path.glob(f"*{SUFFIX}") if p.is_file() and not p.name.startswith(_PROJECTOR))
    splits = {file: match["stem"] if (match := _PART.fullmatch(file.name)) else file.name for file in files}
    if len(set(splits.values())) > 1:
        listed = ", ".join(file.name for file in files[:_SHOWN]) + (" …" if len(files) > _SHOWN else "")
        raise FormatError(f"holds several GGUF models: {listed}", fix="give one of these files").at(str(path))
    return gguf_paths(files[0]) if files else ()


def _parts(folder: Path, match: re.Match[str]) -> tuple[Path, ...]:
    count = int(match["count"])
    paths = [folder / f"{match['stem']}-{number:05}-of-{count:05}{SUFFIX}" for number in range(1, count + 1)]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing or not paths:
        what = f"{missing.name if missing else match[0]} is missing: the model is split into {count} files"
        raise FormatError(what, fix="download the missing part").at(str(folder))
    return tuple(paths)
