"""One unmerge in progress, by an undo patch: changed tensors are restored, and all others are checked."""

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from loralens.core.lazy import Array
from loralens.core.progress import progress
from loralens.core.threads import in_threads
from loralens.errors import FormatError, MismatchError, place
from loralens.formats.files.shards import check_index
from loralens.formats.models.checkpoint import resolve_path
from loralens.formats.models.model_files import CONFIG, model_files, offsets_of
from loralens.formats.models.model_writer import Change, copy_bytes, write_model
from loralens.formats.records.kept import restore_kept
from loralens.formats.records.merged import BEFORE, CERTIFICATE
from loralens.formats.records.undo import NAME, read_undo
from loralens.linalg.device import Device
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import as_matrix
from loralens.merging.record import feed_hash
from loralens.merging.undo.layout import parse_undo
from loralens.merging.undo.restore import restore_tensor

THREADS = os.cpu_count() or 1
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
        undo_beside = (
            merged.with_name(f"{merged.stem}.{NAME}") if merged.suffix else None
        )  # of a model that is one file
        outside = undo or undo_beside
        if outside:
            restore_kept(outside, merged)
        root = resolve_path(merged)
        self.file = file = undo or (root / NAME if root.is_dir() else root.with_name(f"{root.stem}.{NAME}"))
        arrays, content = read_undo(file)
        self.files = model_files(root)
        self.tensors = self.files.tensors
        self._digests: dict[str, Any] = {}
        with place(file):
            self.undo = parse_undo(arrays, content)
            missing = [key for key in (*self.undo.entries, *self.undo.copies) if key not in self.tensors]
            if missing or len(self.undo.headers) != len(self.files.shards):
                what = f"{merged} has no {missing[0]}, which was merged" if missing else f"{merged} has other shards"
                raise MismatchError(what, fix="give the model that this undo file was written for")
            self._check_names()
            spoken = {*self.undo.entries, *self.undo.copies, *self.undo.dropped}
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
        changeable = indices | ({CONFIG} & set(self.files.companions))
        for name, text in self.undo.texts.items():
            if name not in changeable or not isinstance(text, str):
                raise FormatError(f"it would replace {name!a:.100}, which no merge changes", fix=ANOTHER)
            if name in indices:
                check_index(text, name)
        if set(self.undo.headers) != {shard.name for shard in self.files.shards}:
            raise MismatchError("its shards are not those of the merged model", fix=ANOTHER)

    def _of_base(self) -> list[str]:
        """The keys of the base, by the headers of its shards."""
        try:
            headers = [offsets_of(text.encode("utf-8")) for text in self.undo.headers.values()]
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
        files, undo = self.files, self.undo
        files.check_copyable()
        folder = files.root.is_dir()
        names = list(undo.headers) if folder else [files.shards[0].name]
        changes = {key: Change(*undo.outline(key)) for key in (*undo.entries, *undo.dropped)}
        with progress("unmerging", copy_bytes(files.tensors, changes)) as step:
            write_model(
                files,
                output,
                changes=changes,
                fill=self._fill,
                watch=self._watch,
                headers=dict(zip(names, map(_header, undo.headers.values()), strict=True)),
                texts=undo.texts if folder else {},
                without=(NAME, CERTIFICATE),
                names={name: name.removeprefix(BEFORE) for name in files.companions if name.startswith(BEFORE)},
                write_beside=self._check,
                inputs=[("the merged model", files.root), ("the undo file", self.file)],
                overwrite=overwrite,
                threads=THREADS,
                step=step,
            )

    def rehearse(self) -> None:
        """Everything but the writing: every tensor of the base is proven.

        Raises
        ------
        MismatchError, FormatError
            As when it is written.
        """
        changes = {key: Change(*self.undo.outline(key)) for key in (*self.undo.entries, *self.undo.dropped)}
        copies = {key: self.tensors[key] for key in self.undo.copies if key not in changes}

        def prove(key: str) -> None:
            for rows in self._fill(key) if key in changes else self._copy(key):
                if step:
                    step(rows.nbytes)

        with progress("checking", copy_bytes(copies, changes)) as step:
            in_threads(prove, [*changes, *copies], THREADS)
        self._check(self.file)

    def _fill(self, key: str) -> Iterator[Array]:
        with place(key):
            if key in self.undo.dropped:
                yield self.undo.dropped[key].read()
            else:
                yield from restore_tensor(self.undo.tensor(key), self.tensors[key], device=self.device)

    def _copy(self, key: str) -> Iterator[Array]:
        """The rows of a tensor that the merge left as it was, hashed."""
        tensor = self.tensors[key]
        for rows in MatrixRows(tensor, as_matrix(tensor.shape)).blocks():
            self._watch(key, rows)
            yield rows

    def _watch(self, key: str, rows: Array) -> None:
        feed_hash(self._digests.setdefault(key, sha256()), rows)

    def _check(self, _: Path) -> None:
        """Whether what was copied is what was copied then."""
        self.files.check_unchanged()
        for key, digest in self.undo.copies.items():
            if key in self._digests and self._digests[key].hexdigest() != digest:
                raise MismatchError(f"{key} is not as it was merged: it was changed since", fix=LATER)


def _header(text: str) -> bytes:
    data = text.encode("utf-8")
    return len(data).to_bytes(8, "little") + data
