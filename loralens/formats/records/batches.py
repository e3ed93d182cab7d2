"""The record of a batch: which adapters a run has finished in its output folder, from what, and with which options.

It is one hidden JSON file in the output folder, which is replaced as a whole after every adapter. A later run skips an
adapter if its entry has the digests of the input, of the options and of the output that are there now. No path in the
record is ever used: entries are looked up by the names of the targets of a run.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, final

from loralens.errors import FormatError, place
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import OpenFile, read_json
from loralens.formats.files.disk import disk_errors
from loralens.formats.files.json_text import dumps, is_safe_text
from loralens.formats.files.leftovers import COMPANIONS
from loralens.formats.files.location import RECORD_NAME, SUFFIXES, adapter_file

FORM = 1  # the version of the record; a record with another number is refused
BEGUN = "begun"  # the status of an entry whose adapter was not finished
STATUSES = (BEGUN, "written", "unchanged", "no")
MOST_MESSAGES = 100  # most messages that are kept for an adapter
BLOCK = 1 << 20  # bytes that are read at a time
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FIX = f"remove {RECORD_NAME}, or choose another output folder"


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """What a run did with one adapter.

    Attributes
    ----------
    verb : str
        The verb that wrote the output.
    source : str
        The real path of the adapter.
    status : str
        ``begun``, ``written``, ``unchanged``, or ``no`` if nothing was to be written.
    version : str
        The version of loralens.
    input, options : str or None
        The digests of the adapter and of the options; None if they have none, so that the adapter is never skipped.
    output : str or None
        The digest of the output; None if there is none.
    numbers : mapping of str to value
        The numbers of the row, which a later run shows again.
    messages : sequence of str
        The messages about the adapter.
    """

    verb: str
    source: str
    status: str
    version: str
    input: str | None = None
    options: str | None = None
    output: str | None = None
    numbers: Mapping[str, Any] | None = None
    messages: Sequence[str] = ()


@final
class BatchRecord:
    """The record in an output folder.

    Attributes
    ----------
    entries : dict of str to BatchEntry
        The name of a target, relative to the folder and with ``/`` → its entry.
    """

    __slots__ = ("entries", "folder")

    def __init__(self, folder: Path, entries: Mapping[str, BatchEntry] | None = None) -> None:
        self.folder, self.entries = folder, dict(entries or {})

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record in a folder; without one it is empty. Entries that are damaged are left out.

        Raises
        ------
        FormatError
            The file exists, but is not such a record.
        """
        file = folder / RECORD_NAME
        if not os.path.lexists(file):
            return cls(folder)
        # A link could lead to any file, and the next writing would replace it.
        if not file.is_file() or file.is_symlink():
            raise FormatError("is not a regular file", fix=_FIX).at(str(file))
        record = read_json(file, fix=_FIX)
        entries = record.get("entries")
        with place(file):
            if record.get("loralens_batch") != FORM or not isinstance(entries, dict):
                raise FormatError("is not the record of a batch that this version reads", fix=_FIX)
        checked = {name: entry for name, value in entries.items() if (entry := read_entry(value))}
        return cls(folder, checked)

    def write(self) -> None:
        """Replace the file. Other programs see the old record or the new one."""
        record = {"loralens_batch": FORM, "entries": {name: asdict(entry) for name, entry in self.entries.items()}}
        with atomic_file(self.folder / RECORD_NAME) as stream:
            stream.write(dumps(record).encode("utf-8"))


def read_entry(value: object) -> BatchEntry | None:
    """The entry in a JSON value; None if a part of it is missing or has the wrong type."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(BatchEntry)}:
        return None
    messages, numbers = value["messages"], value["numbers"]
    texts = [value[name] for name in ("verb", "source", "status", "version")]
    digests = [value[name] for name in ("input", "options", "output") if value[name] is not None]
    valid = (
        all(map(is_safe_text, texts))
        and value["status"] in STATUSES
        and all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests)
        and (numbers is None or isinstance(numbers, dict))
        and isinstance(messages, list)
        and len(messages) <= MOST_MESSAGES
        and all(isinstance(text, str) for text in messages)
    )
    return BatchEntry(**value) if valid else None


def adapter_digest(path: Path) -> str:
    """SHA-256 of the adapter at a path: its weights, and the files beside them that belong to it.

    Raises
    ------
    FormatError, OptionError
        There is no adapter, or it cannot be read.
    """
    weights = adapter_file(path)
    return files_digest([weights, *(weights.with_name(name) for name in COMPANIONS)])


def output_digest(path: Path) -> str | None:
    """SHA-256 of what is at the target of a run: a file, or the files of adapters in a folder; None if nothing is.

    Other files in a folder do not count: a README that a user adds does not change the digest. Another adapter does.
    """
    files = [path] if os.path.lexists(path) else []
    if path.is_dir():
        with disk_errors(path):
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES or file.name in COMPANIONS)
    return files_digest(files) if files else None


def files_digest(files: Sequence[Path]) -> str:
    """SHA-256 of the names and contents of those of the files that exist; times do not count."""
    from hashlib import sha256  # it loads OpenSSL, and runs of one adapter need no hash

    hasher = sha256()
    for file in files:
        if not file.exists():
            continue
        with place(file):
            content = OpenFile(file)
        # The length comes before the content, so that no two lists of files give the same bytes.
        hasher.update(f"{file.name!a} {content.size}\n".encode())
        for start in range(0, content.size, BLOCK):
            hasher.update(content.read(start, min(BLOCK, content.size - start)))
    return hasher.hexdigest()
