"""One unmerge by an undo file while it runs: every tensor that changed is restored, every other one is checked."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from loralens.cli.merge_run import bytes_of
from loralens.cli.progress import progress
from loralens.core.lazy import Array
from loralens.errors import FormatError, MismatchError, place
from loralens.formats.files.shards import check_index
from loralens.formats.models.checkpoint import resolved
from loralens.formats.models.model_files import CONFIG, model_files, offsets_of
from loralens.formats.models.model_writer import Change, copy_bytes, write_model
from loralens.formats.records.kept import settle
from loralens.formats.records.merged import BEFORE, CERTIFICATE
from loralens.formats.records.undo import NAME, read_undo
from loralens.linalg.device import Device
from loralens.merging.undo.layout import merge_undo
from loralens.merging.undo.restore import restored

ANOTHER = "give the undo file of the merge that wrote this model, undamaged"
DAMAGED = "the undo file is damaged, or of another model: use another copy"
LATER = "give the model that this undo file was written for; adapters merged later are unmerged first"


class UnmergeRun:
    """A merged model and its undo file.

    Parameters
    ----------
    merged : Path
    undo : Path or None
        Where the undo file is; beside or in the model where None.
    device : Device
        Where the products of the updates are made.

    Raises
    ------
    MismatchError
        They do not belong together, as far as names tell.
    """

    def __init__(self, merged: Path, undo: Path | None, device: Device) -> None:
        self.device = device
        beside = merged.with_name(f"{merged.stem}.{NAME}") if merged.suffix else None  # of a model that is one file
        outside = undo or beside
        if outside:
            settle(outside, merged)
        root = resolved(merged)
        self.file = file = undo or (root / NAME if root.is_dir() else root.with_name(f"{root.stem}.{NAME}"))
        arrays, content = read_undo(file)
        self.files = model_files(root)
        self.known = self.files.tensors
        self._digests: dict[str, Any] = {}
        with place(file):
            self.held = merge_undo(arrays, content)
            missing = [key for key in (*self.held.entries, *self.held.copies) if key not in self.known]
            if missing or len(self.held.headers) != len(self.files.shards):
                what = f"{merged} has no {missing[0]}, which was merged" if missing else f"{merged} has other shards"
                raise MismatchError(what, fix="give the model that this undo file was written for")
            self._check_names()
            spoken = {*self.held.entries, *self.held.copies, *self.held.dropped}
            unknown = [key for key in self._of_base() if key not in spoken]
            if unknown:
                raise MismatchError(f"says nothing of {unknown[0]}, which the base has", fix=DAMAGED)

    def _check_names(self) -> None:
        """Refuse names of files that a merge would not have changed.

        An undo file may come from anybody. What it restores besides numbers is the configuration and the indices, and
        these are files of the merged model.

        Raises
        ------
        FormatError
            Another text, or an index of shards that lie elsewhere.
        MismatchError
            Headers of other shards.
        """
        if not self.files.root.is_dir():
            return
        indices = {index.name for index in self.files.indices}
        changeable = indices | ({CONFIG} & set(self.files.others))
        for name, text in self.held.texts.items():
            if name not in changeable or not isinstance(text, str):
                raise FormatError(f"it would replace {name!a:.100}, which no merge changes", fix=ANOTHER)
            if name in indices:
                check_index(text, name)
        if set(self.held.headers) != {shard.name for shard in self.files.shards}:
            raise MismatchError("its shards are not those of the merged model", fix=ANOTHER)

    def _of_base(self) -> list[str]:
        """The keys of the base, by the headers of its shards."""
        try:
            headers = [offsets_of(text.encode("utf-8")) for text in self.held.headers.values()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise FormatError("its headers are not as they were written", fix=DAMAGED) from error
        shards = zip(self.files.shards, headers, strict=True)
        return [shard.prefix + key for shard, header in shards for key in header]

    def write(self, output: Path, *, overwrite: bool) -> None:
        """The base; it appears only if every tensor of it is proven.

        Raises
        ------
        MismatchError, FormatError
            A tensor is not as it was merged, or what comes out is not the base.
        """
        files, held = self.files, self.held
        files.check_copyable()
        folder = files.root.is_dir()
        names = list(held.headers) if folder else [files.shards[0].name]
        changes = {key: Change(*held.outline(key)) for key in (*held.entries, *held.dropped)}
        with progress("unmerging", copy_bytes(files.tensors, changes)) as step:
            write_model(
                files,
                output,
                changes=changes,
                fill=self._fill,
                watch=self._watch,
                headers=dict(zip(names, map(_header, held.headers.values()), strict=True)),
                texts=held.texts if folder else {},
                without=(NAME, CERTIFICATE),
                names={name: name.removeprefix(BEFORE) for name in files.others if name.startswith(BEFORE)},
                beside=self._check,
                inputs=[("the merged model", files.root), ("the undo file", self.file)],
                overwrite=overwrite,
                threads=os.cpu_count() or 1,
                step=step,
            )

    def _fill(self, key: str) -> Iterator[Array]:
        with place(key):
            if key in self.held.dropped:
                yield self.held.dropped[key].read()
            else:
                yield from restored(self.held.tensor(key), self.known[key], device=self.device)

    def _watch(self, key: str, rows: Array) -> None:
        self._digests.setdefault(key, sha256()).update(bytes_of(rows))

    def _check(self, _: Path) -> None:
        """Whether what was copied is what was copied then."""
        self.files.check_unchanged()
        for key, digest in self.held.copies.items():
            if key in self._digests and self._digests[key].hexdigest() != digest:
                raise MismatchError(f"{key} is not as it was merged: it was changed since", fix=LATER)


def _header(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data
