"""Telling the files that a merge wrote into a model's folder, which may be overwritten, from all other files.

The certificate of a merge lists every file that it wrote, with its size. A file that is not in this list, or that has
another size now, was written by somebody else: even ``--overwrite`` does not remove it.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from loralens.errors import LoraLensError, OptionError
from loralens.formats.files.container import read_json, read_safetensors
from loralens.formats.files.json_text import finite_number
from loralens.formats.files.relative_name import is_relative_name
from loralens.formats.records.undo import KEY, NAME

CERTIFICATE = "merge_certificate.json"
BEFORE = "before/"  # the folder for the undo file and certificate of an earlier merge, which unmerging moves back
FILES = "files"  # the key of the list of files in the certificate
# under before/, each merge of a merged model adds one level
_OWN = re.compile(rf"(?:{BEFORE})*(?:{re.escape(NAME)}|{re.escape(CERTIFICATE)})")
_SHOWN = 5  # names in a message, so that it stays readable


class MergeSettings(NamedTuple):
    """How a merge was made, as its certificate says; an attribute is None where the certificate does not say it.

    Attributes
    ----------
    bits
        ``keep`` if the merge moved codes.
    rounding
        The word that was given to ``--rounding``.
    """

    bits: str | None = None
    rounding: str | None = None
    seed: int | None = None


def merge_settings(path: Path) -> MergeSettings:
    """How the merge with this certificate was made; nothing is known if the file is missing or damaged."""
    try:
        content = read_json(path) if path.is_file() else {}
    except (LoraLensError, OSError):
        return MergeSettings()
    rounding = content.get("rounding")
    fields = rounding if isinstance(rounding, dict) else {}
    mode, seed, bits = fields.get("mode"), fields.get("seed"), content.get("bits")
    return MergeSettings(
        bits if isinstance(bits, str) else None,
        mode if isinstance(mode, str) else None,
        seed if type(seed) is int else None,
    )


class CertifiedAdapter(NamedTuple):
    """An adapter in a certificate: the fingerprint of what was merged, and its weight."""

    fingerprint: str
    weight: float


def certified_adapters(path: Path) -> list[CertifiedAdapter]:
    """The adapters of the merge with this certificate, without damaged entries; none of a missing or damaged file."""
    try:
        content = read_json(path) if path.is_file() else {}
    except (LoraLensError, OSError):
        return []
    listed = content.get("adapters")
    entries = [each for each in listed if isinstance(each, dict)] if isinstance(listed, list) else []
    pairs = [(each.get("fingerprint"), finite_number(each.get("weight"))) for each in entries]
    return [CertifiedAdapter(text, weight) for text, weight in pairs if isinstance(text, str) and weight is not None]


def file_sizes(folder: Path) -> dict[str, int]:
    """The relative path, with ``/``, and the bytes of every file under a folder; links are not followed."""
    sizes = {}
    for home, inner, names in os.walk(folder):
        links = [name for name in inner if (Path(home) / name).is_symlink()]  # os.walk counts them as folders
        for name in (*names, *links):
            path = Path(home) / name
            sizes[path.relative_to(folder).as_posix()] = path.lstat().st_size
    return dict(sorted(sizes.items()))


def check_replaceable(target: Path, names: Collection[str]) -> None:
    """Refuse to replace a folder if a file that no merge wrote would be lost; ``names`` are the new folder's files.

    Raises
    ------
    OptionError
        The folder holds files that the new one does not have and no merge wrote. The message names them.
    """
    written = _files_written(target)
    # A file with a new version in the new folder is replaced, and not lost.
    strange = [n for n, size in file_sizes(target).items() if n not in names and written.get(n) != size]
    # Undo files and certificates are ours, by their usual name or by their content.
    lost = [n for n in strange if not (_OWN.fullmatch(n) or is_undo(target / n) or is_certificate(target / n))]
    if lost:
        listed = ", ".join(lost[:_SHOWN]) + (f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else "")
        fix = "move it elsewhere, or choose another target: --overwrite replaces the whole folder"
        raise OptionError(f"holds files that no merge wrote and the new model does not have: {listed}", fix=fix)


def _files_written(folder: Path) -> dict[str, int]:
    """The files that a merge wrote into a folder, and their sizes, by its certificate."""
    try:
        listed = read_json(folder / CERTIFICATE).get(FILES)
    except (LoraLensError, OSError):
        return {}
    if not isinstance(listed, dict):
        return {}
    return {name: size for name, size in listed.items() if is_relative_name(name) and type(size) is int}


def is_undo(path: Path) -> bool:
    """Whether a file is an undo file."""
    try:
        return path.is_file() and KEY in (read_safetensors(path).metadata or {})
    except (LoraLensError, OSError):
        return False


def is_certificate(path: Path) -> bool:
    """Whether a file is the certificate of a merge."""
    try:
        content = read_json(path) if path.suffix == ".json" and path.is_file() else {}
    except (LoraLensError, OSError):
        return False
    # These keys together occur only in a certificate.
    return {"loralens", "base", "result", "adapters", "modules", "total"} <= content.keys()
