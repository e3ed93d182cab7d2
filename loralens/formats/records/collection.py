"""Finding the adapters under a folder by the names of files, and telling them from models by their headers."""

import json
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Literal, final

from loralens.core.adapter import Adapter
from loralens.core.messages import note
from loralens.core.names import some
from loralens.core.stored import parse_json
from loralens.errors import LoraLensError, OptionError
from loralens.formats import load
from loralens.formats.dialects.dialect_table import FORMATS
from loralens.formats.files.container import (
    CONFIG,
    PREFIX,
    OpenFile,
    read_header,
    read_json,
    read_metadata,
    read_safetensors,
)
from loralens.formats.files.gguf_file import read_gguf_header
from loralens.formats.files.json_text import MOST_MEMORY, parsed_size, unique_keys
from loralens.formats.files.location import config_beside, is_gguf, is_pickle, is_tensor_file, weights_among
from loralens.formats.files.outside import listings

_OF_THE_SYSTEM = ("/proc/", "/sys/")  # /proc has links to the folders in which other programs work

SCALAR = 8  # bytes of the largest tensor of one number

Status = Literal["adapter", "unreadable", "other"]


@final
@dataclass(frozen=True, slots=True)
class FolderEntry:
    """The result of `examine_file` for one path.

    Attributes
    ----------
    path
        The file, or a folder that has a configuration without weights.
    adapter
        The adapter if there is one; its numbers are not read yet.
    size
        The bytes on disk; 0 for a folder.
    status
        ``adapter``; ``unreadable``, if it should be one; ``other``, for the weights of a model or another tensor file.
    reason, fix
        Why it is not an adapter, and what the user can do.
    """

    path: Path
    adapter: Adapter | None
    size: int
    status: Status
    reason: str = ""
    fix: str = ""


def candidates(
    root: Path,
    *,
    failed: Callable[[Path, OSError], object] | None = None,
    linked: Callable[[Path], object] | None = None,
) -> list[Path]:
    """Tensor files under a folder, and folders that have an adapter_config.json without weights, in order of paths.

    Hidden folders are left out, and so are files that training tools leave beside an adapter, such as the state of an
    optimiser. Links to folders are followed, and each folder is visited once; if a folder has a path under ``root``
    without links, this path is given. Links to a folder that contains ``root``, and links into ``/proc`` and ``/sys``,
    are not followed. ``failed`` receives
    every folder that cannot be listed, and the error; ``linked`` receives every link to a folder.

    Raises
    ------
    OptionError
        ``root`` is not a folder.
    """
    return list(map(Path, candidate_paths(root, failed=failed, linked=linked)))


def candidate_paths(
    root: Path,
    *,
    failed: Callable[[Path, OSError], object] | None = None,
    linked: Callable[[Path], object] | None = None,
) -> list[str]:
    """What `candidates` returns, as texts: thousands of Paths take half of the time in which folders are listed."""
    if not root.is_dir():
        raise OptionError(f"{root}: is not a folder", fix="give the folder to look through")
    return sorted(_walk(root, failed, linked), key=lambda path: path.split(os.sep))  # noqa: PTH206


def _walk(
    root: Path, failed: Callable[[Path, OSError], object] | None, linked: Callable[[Path], object] | None
) -> Iterator[str]:
    home = os.path.realpath(root)
    # Device and inode identify a folder. Its real path would need a call of the system for every folder above it.
    visited: set[tuple[int, int]] = set()
    # Links wait until everything that can be reached without them was visited, so that paths without links come first.
    waiting = deque([root])
    while waiting:
        start = waiting.popleft()
        # A link to a folder that contains root could lead through the whole disk, and back to root.
        if start != root:
            real = os.path.realpath(start)
            if os.path.commonpath([real, home]) == real or f"{real}/".startswith(_OF_THE_SYSTEM):
                continue
        for folder, files, links in listings(start, without=lambda name: name.startswith("."), failed=failed):
            try:
                status = os.stat(folder)  # noqa: PTH116
            except OSError:  # it was removed meanwhile
                continue
            # A loop of links ends here.
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            # Not Path.is_dir, which raises an error where the permission for the folder of a link is missing.
            inner = [
                name
                for name in links
                if not name.startswith(".") and os.path.isdir(os.path.join(folder, name))  # noqa: PTH112, PTH118
            ]
            for name in inner:
                link = Path(folder, name)
                waiting.append(link)
                if linked:
                    linked(link)
            yield from _in_folder(folder, [name for name in files if name not in inner])


def note_repeated_links(root: Path, candidates: Sequence[Path], links: Sequence[Path]) -> None:
    """Print a note about links to folders within ``root`` that hold candidates, since candidates are read only once.

    ``links`` are all links to folders that `candidates` has found.
    """
    # Most folders have none, and the real paths of thousands of candidates take long.
    if not links:
        return
    home = Path(os.path.realpath(root))
    holding = {folder for path in candidates for folder in Path(os.path.realpath(path)).parents}
    repeated = []
    for link in links:
        target = Path(os.path.realpath(link))
        if target in holding and home in target.parents:
            repeated.append(f"{link.relative_to(root)} → {target.relative_to(home)}")
    if repeated:
        one = "a link to a folder that is read anyway is"
        many = "links to folders that are read anyway are" if len(repeated) > 1 else one
        note(f"{root}: {many} left out: {some(sorted(repeated))}")


def _in_folder(folder: str, files: Sequence[str]) -> Iterator[str]:
    """The candidates among the files of a folder."""
    yield from (os.path.join(folder, name) for name in weights_among(files))  # noqa: PTH118
    # The weights are missing, which the user should know.
    if CONFIG in files and not any(map(is_tensor_file, files)):
        yield folder


def folder_labels(root: Path, paths: Sequence[Path]) -> Mapping[Path, str]:
    """The names of files in the table, relative to ``root``: a folder stands for the only adapter in it.

    PEFT calls every file ``adapter_model.safetensors``, so the folder says more, and in less space.
    """
    alone = {parent for parent, files in Counter(path.parent for path in paths).items() if files == 1}
    # A root that has a configuration and no weights is one of the paths itself.
    return {
        path: str((path.parent if path.parent in alone and root not in (path, path.parent) else path).relative_to(root))
        for path in paths
    }


def examine_file(path: Path, *, once: bool = False) -> FolderEntry:
    """Find out what a candidate is by its header; numbers only from old files of torch. It raises no LoraLensError."""
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError:
        size = 0
    try:
        return FolderEntry(path, load(path, once=once, strict=False), size, "adapter")
    except LoraLensError as error:
        # A damaged file cannot be told from a damaged adapter, so it is reported.
        status: Status = "other" if _is_model(path) else "unreadable"
        reason = "holds tensors, but no LoRA pairs" if status == "other" else error.what
        return FolderEntry(path, None, size, status, reason, "" if status == "other" else error.fix)


def _is_model(path: Path) -> bool:
    """Whether a file that is not an adapter is a valid tensor file without an adapter's configuration beside it."""
    try:
        # A pickle is not opened just to find out what it is.
        if path.is_dir() or (path.parent / CONFIG).exists() or is_pickle(path):
            return False
        if is_gguf(path):
            kind = read_gguf_header(path).values.get("general.type")
            return kind is None or kind.value != "adapter"
        stored = read_safetensors(path)
    except (LoraLensError, OSError):
        return False
    return not any(form.detect(stored) for form in FORMATS)


# Metadata that only people read. Of these keys the readers look at those that follow.
_NOTES = ("ss_", "sshs_", "modelspec.")
_READ_NOTES = ("ss_base_model_version", "ss_network_", "ss_sd_model_name", "modelspec.architecture")
_START = re.compile(r'\{\s*"__metadata__"\s*:\s*')


class HeaderLayouts:
    """Tells which safetensors files differ in nothing that the readers see, so that only one of them need be read.

    The header of an adapter of SDXL has 3,000 tensors, which take 0.1 s to read and to check. A collection has many
    files of one trainer and rank.
    """

    def __init__(self) -> None:
        self._scalars: dict[bytes, list[tuple[int, int]]] = {}

    def key(self, path: Path) -> Hashable | None:
        """Everything that the readers see of a file and its configuration; None of other files and of damaged ones.

        This is the size of its numbers, its header without notes about the training, and tensors of one number, such as
        α.
        """
        try:
            file = OpenFile(path)
            header = read_header(file)
            metadata, tensors = _split_header(header[PREFIX:])
            layout = sha256(tensors).digest()
            if layout not in self._scalars:
                if parsed_size(tensors) > MOST_MEMORY:
                    return None
                spans = (entry["data_offsets"] for name, entry in parse_json(tensors).items())
                self._scalars[layout] = [(begin, end - begin) for begin, end in spans if 0 < end - begin <= SCALAR]
            scalars = b"".join(file.read(len(header) + begin, size) for begin, size in self._scalars[layout])
            beside = config_beside(path)
            config = json.dumps(read_json(beside), sort_keys=True) if beside else None
        except (LoraLensError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return None
        seen = {k: v for k, v in (metadata or {}).items() if k.startswith(_READ_NOTES) or not k.startswith(_NOTES)}
        return file.size - len(header), layout, scalars, config, metadata is None, frozenset(seen.items())


def metadata_of(path: Path) -> Mapping[str, str] | None:
    """The metadata of a safetensors file, without a look at its tensors; None of other files."""
    try:
        return _split_header(read_header(OpenFile(path))[PREFIX:])[0]
    except (LoraLensError, OSError, ValueError, RecursionError):
        return None


def _split_header(text: bytes) -> tuple[Mapping[str, str] | None, bytes]:
    """The metadata of a header and the JSON of its tensors; metadata at another place than the first are refused."""
    decoded = text.decode("utf-8")
    start = _START.match(decoded)
    if not start:
        if "__metadata__" in decoded:
            raise ValueError
        return None, text
    metadata, end = _METADATA.raw_decode(decoded, start.end())
    return read_metadata(metadata), ("{" + decoded[end:].lstrip(" ,")).encode()


_METADATA = json.JSONDecoder(object_pairs_hook=unique_keys)
