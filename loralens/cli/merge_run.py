"""One merge while it runs: what was seen of every tensor, and the files that come of it."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from loralens.cli.merge_inputs import Inputs
from loralens.cli.progress import progress
from loralens.cli.terminal import say
from loralens.core.lazy import Array, LazyArray
from loralens.errors import OptionError, place
from loralens.formats.files.apart import check_apart
from loralens.formats.files.container import dumps
from loralens.formats.files.writing import replacing
from loralens.formats.models.model_writer import Change, copy_bytes, write_model
from loralens.formats.records.kept import keeping, settle
from loralens.formats.records.merged import BEFORE, CERTIFICATE, FILES, file_sizes, is_certificate, is_undo
from loralens.formats.records.undo import NAME, Spool, write_undo
from loralens.linalg.device import Device
from loralens.merging.apply import prepare
from loralens.merging.record import TensorRecord, Watch
from loralens.merging.rounding import Rounding
from loralens.merging.summary import Hashed, model_hash, module_entries, total_entry
from loralens.merging.undo.layout import VERSION, digest, packed
from loralens.merging.undo.patch import in_memory
from loralens.version import __version__

THREADS = os.cpu_count() or 1


class MergeRun:
    """A merge, and the records of it.

    Parameters
    ----------
    given : Inputs
    rounding, seed
    fidelity, undo : bool
        Whether to measure what arrives, and to keep what gives the base back.
    device : Device
        Where the products of the updates are made.
    """

    def __init__(self, given: Inputs, rounding: str, seed: int, *, fidelity: bool, undo: bool, device: Device) -> None:
        self.given, self.rounding, self.seed, self.device = given, rounding, seed, device
        self.fidelity, self.undo = fidelity, undo
        self.hashes = fidelity or undo
        self.records: dict[str, TensorRecord] = {}
        self.digests: dict[str, Any] = {}
        self.spool: Spool | None = None
        self.arrays: dict[str, LazyArray] = {}
        self.entries: dict[str, Any] = {}
        self.files: dict[str, int] | None = None  # of the folder that was written, and their bytes
        self._lock = Lock()

    def fill(self, key: str) -> Iterator[Array]:
        """The merged rows of one tensor."""
        with place(key):
            merge = prepare(
                self.given.plan.tensors[key],
                dtype=self.given.dtypes[key],
                rounding=Rounding(self.rounding, self.seed, key),  # type: ignore[arg-type]
                device=self.device,
            )
            keep = self.spool.keep if self.spool else in_memory
            watch = Watch(merge, hashes=self.hashes, fidelity=self.fidelity, undo=self.undo, keep=keep)
            yield from watch.blocks()
            record = watch.record()
            arrays: dict[str, LazyArray] = {}
            entry = None
            if self.spool and record.patch:
                arrays, entry = packed(record)
            with self._lock:
                self.arrays |= arrays
                if entry:
                    self.entries[key] = entry
                self.records[key] = replace(record, patch=None)

    def rehearse(self) -> None:
        """Everything but the writing."""
        from loralens.core.threads import in_threads

        changes = self._changes()
        with progress("measuring", copy_bytes({}, changes)) as step:

            def work(key: str) -> None:
                for rows in self.fill(key):
                    if step:
                        step(rows.nbytes)

            in_threads(work, list(changes), THREADS)

    def copied(self, key: str, rows: Array) -> None:
        """Rows of a tensor that stays as it is."""
        self.digests.setdefault(key, sha256()).update(bytes_of(rows))

    def write(
        self, output: Path, *, undo: Path | None, certificate: Path | None, certify: bool, overwrite: bool
    ) -> None:
        """The merged model, and beside it or in it the undo file and the certificate."""
        files = self.given.files
        files.check_copyable()
        if not files.root.is_dir():
            undo = undo or output.with_name(f"{output.stem}.{NAME}")
            certificate = certificate or output.with_name(f"{output.stem}.{CERTIFICATE}")
        undo, certificate = undo or output / NAME, certificate or output / CERTIFICATE
        written = ([undo] if self.undo else []) + ([certificate] if certify else [])
        outside = [file for file in written if _within(file, output) is None]
        for file in outside:
            settle(file, output)
        if self.undo:
            self._check_beside(undo, output, is_undo, what="an undo file", overwrite=overwrite)
        if certify:
            self._check_beside(certificate, output, is_certificate, what="a certificate", overwrite=overwrite)
        if self.undo and certify and os.path.realpath(undo) == os.path.realpath(certificate):
            raise OptionError(f"{undo}: is given for undo file and certificate", fix="choose another place for one")

        def beside(part: Path) -> None:
            files.check_unchanged()
            if self.undo:
                write_undo(self._undo_arrays(), self._undo_content(), _in_part(undo, output, part))
            if files.root.is_dir():
                self.files = file_sizes(part)
            if certify:
                text = dumps(self.certificate())
                with replacing(_in_part(certificate, output, part)) as stream:
                    stream.write(text.encode("utf-8"))

        ours = [name for name in files.others if name in (NAME, CERTIFICATE) or name.startswith(BEFORE)]
        changes = self._changes()
        total = copy_bytes(files.tensors, changes)
        with Spool(output.absolute().parent) as spool, keeping(outside, output), progress("merging", total) as step:
            self.spool = spool if self.undo else None
            write_model(
                files,
                output,
                changes=changes,
                fill=self.fill,
                watch=self.copied if self.hashes else None,
                dropped=self.given.plan.dropped,
                texts=self.given.texts(),
                names={name: BEFORE + name for name in ours},
                beside=beside,
                inputs=self.given.places(),
                overwrite=overwrite,
                threads=THREADS,
                step=step,
            )
        _say_left_out(files.left_out)

    def _check_beside(
        self, file: Path, output: Path, is_ours: Callable[[Path], bool], *, what: str, overwrite: bool
    ) -> None:
        """Refuse a place for the undo file or the certificate where something else would be lost or not be apart."""
        inner = _within(file, output)
        if inner is not None:
            if inner.as_posix() not in (NAME, CERTIFICATE) and (self.given.files.root / inner).exists():
                raise OptionError(f"{file}: is a file of the model", fix=f"choose another place for {what}")
            return
        check_apart(file, [("the merged model", output), *self.given.places()])
        if file.exists() and not overwrite:
            raise OptionError(f"{file}: exists", fix="choose another place, or give --overwrite")
        if file.exists() and not is_ours(file):
            raise OptionError(f"{file}: exists, and is not {what}", fix="choose another place")

    def _changes(self) -> dict[str, Change]:
        return {key: Change(self.given.dtypes[key], tensor.shape) for key, tensor in self.given.plan.tensors.items()}

    def _undo_arrays(self) -> dict[str, LazyArray]:
        tensors, dropped = self.given.files.tensors, self.given.plan.dropped
        whole = {f"{key}#whole": tensors[key] for key in dropped}
        return dict(sorted({**self.arrays, **whole}.items()))

    def _undo_content(self) -> dict[str, Any]:
        originals = self.given.originals()
        return {
            "version": VERSION,
            "adapters": self.given.adapters,
            "tensors": dict(sorted(self.entries.items())),
            "copies": {key: digest.hexdigest() for key, digest in sorted(self.digests.items())},
            **originals,
            "digest": digest(originals["headers"], originals["texts"]),
        }

    def certificate(self) -> dict[str, Any]:
        """What was merged into what, and how much of it arrived."""
        given = self.given
        records = [self.records[key] for key in given.plan.tensors if key in self.records]
        return {
            "loralens": __version__,
            "base": {"path": given.base, "sha256": self._hash(records, "base")},
            "result": {"sha256": self._hash(records, "merged")},
            "adapters": given.adapters,
            "names": [str(match) for match in given.plan.matches],
            "missing": list(given.plan.missing),
            "notes": list(given.plan.notes),
            "rounding": {"mode": self.rounding, **({"seed": self.seed} if self.rounding == "stochastic" else {})},
            "dtype": given.dtype or "keep",
            "modules": module_entries(records),
            "total": total_entry(records),
            **({} if self.files is None else {FILES: self.files}),
        }

    def _hash(self, records: list[TensorRecord], side: Any) -> str | None:
        """Of a whole model; None where nothing was hashed, or nothing was copied because nothing was written."""
        tensors, dropped = self.given.files.tensors, self.given.plan.dropped
        seen = len(self.digests) + len(dropped) + sum(key in tensors for key in self.records)
        if not self.hashes or seen < len(tensors):
            return None
        copies = {key: digest.hexdigest() for key, digest in self.digests.items()}
        if side == "base":
            copies |= {key: sha256(bytes_of(tensors[key].read())).hexdigest() for key in dropped}
        known = {key: Hashed(tensors[key].dtype, tensors[key].shape, digest) for key, digest in copies.items()}
        return model_hash(records, known, side=side)


def _within(file: Path, folder: Path) -> Path | None:
    """The path of a file from a folder; None where it lies elsewhere."""
    real = Path(os.path.realpath(file.parent)) / file.name
    home = Path(os.path.realpath(folder))
    return real.relative_to(home) if home in real.parents else None


def _in_part(file: Path, output: Path, part: Path) -> Path:
    """Where a file is written before the folder that it goes into has its name."""
    inner = _within(file, output)
    if inner is None:
        return file
    (part / inner).parent.mkdir(parents=True, exist_ok=True)
    return part / inner


def _say_left_out(names: Sequence[str]) -> None:
    """Which files of the base's folder were not copied."""
    if names:
        said = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        say(f"note: left out, as they hold weights that are not merged: {said}", err=True)


def bytes_of(rows: Array) -> memoryview:
    """The bytes of an array as a file holds them."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
