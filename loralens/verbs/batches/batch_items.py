"""Several adapters as the input of one verb: those that were named, and those under a folder; and where each goes."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loralens.core.adapter import Adapter
from loralens.core.progress import progress
from loralens.core.threads import processor_count
from loralens.errors import OptionError
from loralens.formats.files.location import NAMES, RECORD_NAME, SUFFIXES
from loralens.formats.records.collection import candidates, examine_file, folder_labels, note_repeated_links
from loralens.verbs.batches.several import is_collection
from loralens.verbs.inputs.adapters import AdapterSource

# What the name of a target is made of: the name of an adapter, whether it is a single file, and its dialect ("" if it
# cannot be read).
NameTarget = Callable[[PurePosixPath, bool, str], PurePosixPath]


@dataclass(frozen=True, slots=True)
class BatchItem:
    """One adapter of several.

    Attributes
    ----------
    name : str
        Its name among the others: relative to the folder in which it was found, or the last part of its path.
    source : path or Adapter
    single : bool
        Whether it is named by its file, and not by its folder.
    format : str
        Its dialect; empty if it cannot be read, which the verb then reports.
    """

    name: str
    source: AdapterSource
    single: bool = False
    format: str = ""

    @property
    def path(self) -> str:
        """The path, or the name of an object."""
        return self.name if isinstance(self.source, Adapter) else str(self.source)


def find_adapters(
    adapters: Sequence[AdapterSource], *, output: Path | None, allow_pickle: bool = False, once: bool = False
) -> list[BatchItem]:
    """The adapters that were named and those under the folders that were named, each with its name.

    Files that hold tensors and no LoRA pairs are left out; those that cannot be read are not. What lies under
    ``output`` is not an input, so the output folder may be inside a folder of adapters.

    Raises
    ------
    OptionError
        There is no adapter, a path does not exist, or two adapters have one name.
    """
    items: list[BatchItem] = []
    for number, source in enumerate(adapters, start=1):
        if isinstance(source, Adapter):
            items.append(BatchItem(f"adapter-{number}", source, format=source.format))
        elif not isinstance(source, str | os.PathLike):
            raise OptionError(f"{source!r} is not an adapter", fix="give a path, or what loralens.load returns")
        elif is_collection(Path(source)):
            items += _in_folder(Path(source), output, allow_pickle=allow_pickle, once=once)
        else:
            path = Path(source)
            examined = examine_file(path, allow_pickle=allow_pickle, once=once)
            name = path.name if path.name not in ("", "..") else Path(os.path.realpath(path)).name
            items.append(BatchItem(name, source, path.is_file(), examined.adapter.format if examined.adapter else ""))
    if not items:
        raise OptionError("there is no adapter", fix="give adapters, or a folder that has some in it")
    _check_names(items)
    return items


def _in_folder(root: Path, output: Path | None, *, allow_pickle: bool, once: bool) -> Iterator[BatchItem]:
    """The adapters under a folder, with their paths relative to it as names."""
    real, outside = Path(os.path.realpath(root)), Path(os.path.realpath(output)) if output else None
    if outside == real:
        raise OptionError(f"{output} is the folder of the adapters itself", fix="choose another output folder")
    # The outputs of an earlier run may lie below the folder; they are not inputs.
    outputs = outside if outside and real in outside.parents else None
    links: list[Path] = []
    found = candidates(root, linked=links.append)
    paths = [path for path in found if outputs is None or not _lies_in(path, outputs)]
    note_repeated_links(root, paths, links)
    from concurrent.futures import ThreadPoolExecutor  # takes 3 ms to import, and most runs have one adapter

    with progress("looking", len(paths)) as step, ThreadPoolExecutor(processor_count()) as pool:
        listed = []
        try:
            for entry in pool.map(lambda path: examine_file(path, allow_pickle=allow_pickle, once=once), paths):
                listed.append(entry)
                if step:
                    step(1)
        finally:  # after Ctrl-C, files that are not being read yet are not read at all
            pool.shutdown(cancel_futures=True)
    entries = [entry for entry in listed if entry.status != "other"]
    folders = folder_labels(root, [entry.path for entry in entries])
    for entry in entries:
        # An adapter that is alone in its folder is named by the folder if its file has a usual name, as all of PEFT's
        # files have. Any other adapter is named by its file.
        alone = entry.path.is_dir() or (folders[entry.path] != str(entry.path.relative_to(root)))
        folder = entry.path if entry.path.is_dir() else entry.path.parent
        is_folder = alone and (entry.path.is_dir() or entry.path.name in NAMES)
        place = folder if is_folder else entry.path
        name = place.relative_to(root).as_posix() if place != root else root.resolve().name
        yield BatchItem(name, str(place), not is_folder, entry.adapter.format if entry.adapter else "")


def _lies_in(path: Path, folder: Path) -> bool:
    real = Path(os.path.realpath(path))
    return folder == real or folder in real.parents


def _check_names(items: Sequence[BatchItem]) -> None:
    """Refuse two adapters with the same name, because the output of one would replace that of the other."""
    first: dict[str, BatchItem] = {}
    for item in items:
        other = first.setdefault(item.name, item)
        if other is not item:
            raise OptionError(
                f"{other.path} and {item.path} have the same name, {item.name}",
                fix="rename one of them, or give the folder that holds both",
            )


def place_targets(items: Sequence[BatchItem], output: Path, name_target: NameTarget) -> list[Path]:
    """The target of every adapter in the output folder, under the name of the adapter.

    Raises
    ------
    OptionError
        Two adapters would have one target, the output folder is not a folder, or it overlaps with an adapter.
    """
    if output.suffix in SUFFIXES:
        raise OptionError(f"{output}: is the name of one file, and there are several adapters", fix="name a folder")
    if output.exists() and not output.is_dir():
        raise OptionError(f"{output}: is a file, not a folder", fix="choose another output folder")
    names = [name_target(PurePosixPath(item.name), item.single, item.format) for item in items]
    # The record of the run has its own name there.
    counts = Counter([*names, PurePosixPath(RECORD_NAME)])
    for name in names:
        if counts[name] > 1:
            sources = [item.path for item, each in zip(items, names, strict=True) if each == name]
            what = f"{' and '.join(sources)} would both be written to {output / name}"
            raise OptionError(what, fix="rename one of them, or write them into two folders")
    targets = [output / name for name in names]
    _check_apart(items, output, targets)
    return targets


def _check_apart(items: Sequence[BatchItem], output: Path, targets: Sequence[Path]) -> None:
    """Refuse targets that are, hold or lie in one of the adapters; each verb checks the one that it writes again."""
    # Compared by sets of paths and not pair by pair: two hundred adapters have forty thousand pairs.
    sources = {os.path.realpath(item.source): item for item in items if not isinstance(item.source, Adapter)}
    real_output = Path(os.path.realpath(output))
    for folder in (real_output, *real_output.parents):
        if item := sources.get(str(folder)):
            raise OptionError(f"{output} lies within the adapter {item.path}", fix="choose another output folder")
    real_targets = {os.path.realpath(target): target for target in targets}
    # The folder may come from somebody else, with the record that vouches for what lies there.
    for real, target in real_targets.items():
        if real_output not in Path(real).parents:
            raise OptionError(f"{target} leads out of {output} by a link", fix="choose another output folder")
    for real, item in sources.items():
        for path in (Path(real), *Path(real).parents):
            if covering := real_targets.get(str(path)):
                what = f"{covering} is or holds the adapter {item.path}, and would be written over"
                raise OptionError(what, fix="choose another output folder")
