"""One merge in progress: measurements of every tensor, and the files that are written."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from loralens.core.lazy import Array, LazyArray
from loralens.core.messages import note
from loralens.core.progress import progress
from loralens.core.threads import in_threads
from loralens.errors import OptionError, place
from loralens.formats.files.apart import check_apart
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.json_text import dumps
from loralens.formats.models.model_writer import Change, copy_bytes, write_model
from loralens.formats.records.kept import keep_files, restore_kept
from loralens.formats.records.merged import BEFORE, CERTIFICATE, FILES, file_sizes, is_certificate, is_undo
from loralens.formats.records.undo import NAME, Spool, write_undo
from loralens.linalg.device import Device
from loralens.merging.apply import prepare_merge
from loralens.merging.record import MergeRecorder, TensorRecord, feed_hash
from loralens.merging.rounding import MergeRounding, Mode
from loralens.merging.summary import Hashed, MergedModule, merged_modules, model_hash, module_entries, total_entry
from loralens.merging.undo.layout import VERSION, pack_record, text_digest
from loralens.merging.undo.patch import keep_in_memory
from loralens.verbs.inputs.merge_inputs import MergeInputs
from loralens.version import __version__

THREADS = os.cpu_count() or 1
NAMED = 5  # files that are named in a message


class MergeRun:
    """A merge, and the records of it.

    Parameters
    ----------
    inputs : MergeInputs
    rounding : str
    seed : int
        Seed of the random numbers for stochastic rounding.
    fidelity, undo : bool
        Whether to measure what arrives, and to keep what gives the base back.
    device : Device
        Where the products of the updates are made.
    """

    def __init__(
        self, inputs: MergeInputs, *, rounding: Mode, seed: int, fidelity: bool, undo: bool, device: Device
    ) -> None:
        self.inputs, self.rounding, self.seed, self.device = inputs, rounding, seed, device
        self.fidelity, self.undo = fidelity, undo
        self.hashes = fidelity or undo
        self.adapters = [adapter.record() for adapter in inputs.adapters]
        self.records: dict[str, TensorRecord] = {}
        self.digests: dict[str, Any] = {}
        self.spool: Spool | None = None
        self.arrays: dict[str, LazyArray] = {}
        self.entries: dict[str, Any] = {}
        self.files: dict[str, int] | None = None  # of the folder that was written, and their bytes
        self._lock = Lock()

    def rehearse(self) -> None:
        """Everything but the writing."""
        changes = self._changes()
        with progress("measuring", copy_bytes({}, changes)) as step:

            def merge_tensor(key: str) -> None:
                for rows in self._fill(key):
                    if step:
                        step(rows.nbytes)

            in_threads(merge_tensor, list(changes), THREADS)

    def write(self, output: Path, *, undo: Path | None, certificate: Path | None, overwrite: bool) -> None:
        """The merged model, and beside it or in it the undo file and the certificate.

        Parameters
        ----------
        output : Path
        undo, certificate : Path or None
            Where these files go; None: they are not written.
        overwrite : bool
            Replace what stands there, if a merge wrote it.

        Raises
        ------
        OptionError
            A place where something else would be lost, or that is not apart from what is read.
        """
        files = self.inputs.files
        files.check_copyable()
        outside = [file for file in (undo, certificate) if file and _is_within(file, output) is None]
        for file in outside:
            restore_kept(file, output)
        if undo:
            self._check_beside(undo, output, is_undo, what="an undo file", overwrite=overwrite)
        if certificate:
            self._check_beside(certificate, output, is_certificate, what="a certificate", overwrite=overwrite)
        if undo and certificate and os.path.realpath(undo) == os.path.realpath(certificate):
            raise OptionError(f"{undo}: is given for undo file and certificate", fix="choose another place for one")

        def write_beside(part: Path) -> None:
            files.check_unchanged()
            if undo:
                write_undo(self._undo_arrays(), self._undo_content(), _in_unfinished(undo, output, part))
            if files.root.is_dir():
                self.files = file_sizes(part)
            if certificate:
                with atomic_file(_in_unfinished(certificate, output, part)) as stream:
                    stream.write(dumps(self.certificate()).encode("utf-8"))

        ours = [name for name in files.companions if name in (NAME, CERTIFICATE) or name.startswith(BEFORE)]
        changes = self._changes()
        total = copy_bytes(files.tensors, changes)
        with Spool(output.absolute().parent) as spool, keep_files(outside, output), progress("merging", total) as step:
            self.spool = spool if undo else None
            write_model(
                files,
                output,
                changes=changes,
                fill=self._fill,
                watch=self._watch_copy if self.hashes else None,
                dropped=self.inputs.plan.dropped,
                texts=self.inputs.texts(),
                names={name: BEFORE + name for name in ours},
                write_beside=write_beside,
                inputs=self.inputs.places(),
                overwrite=overwrite,
                threads=THREADS,
                step=step,
            )
        if files.left_out:
            names = ", ".join(files.left_out[:NAMED]) + (", …" if len(files.left_out) > NAMED else "")
            note(f"left out, as they hold weights that are not merged: {names}")

    def modules(self) -> list[MergedModule]:
        """How much of the update of every module arrived."""
        return merged_modules(self._records())

    def certificate(self) -> dict[str, Any]:
        """What was merged into what, and how much of it arrived, as a JSON object."""
        inputs, records = self.inputs, self._records()
        return {
            "loralens": __version__,
            "base": {"path": inputs.base, "sha256": self._hash(records, "base")},
            "result": {"sha256": self._hash(records, "merged")},
            "adapters": self.adapters,
            "names": [str(match) for match in inputs.plan.matches],
            "missing": list(inputs.plan.missing),
            "notes": list(inputs.plan.notes),
            "rounding": {"mode": self.rounding, **({"seed": self.seed} if self.rounding == "stochastic" else {})},
            "dtype": inputs.dtype or "keep",
            "modules": module_entries(merged_modules(records)),
            "total": total_entry(records),
            **({} if self.files is None else {FILES: self.files}),
        }

    def _records(self) -> list[TensorRecord]:
        return [self.records[key] for key in self.inputs.plan.tensors if key in self.records]

    def _fill(self, key: str) -> Iterator[Array]:
        """The merged rows of one tensor."""
        with place(key):
            merge = prepare_merge(
                self.inputs.plan.tensors[key],
                dtype=self.inputs.dtypes[key],
                rounding=MergeRounding(self.rounding, self.seed, key),
                device=self.device,
            )
            keep = self.spool.keep if self.spool else keep_in_memory
            watch = MergeRecorder(merge, hashes=self.hashes, fidelity=self.fidelity, undo=self.undo, keep=keep)
            yield from watch.blocks()
            record = watch.record()
            arrays: dict[str, LazyArray] = {}
            entry = None
            if self.spool and record.patch:
                arrays, entry = pack_record(record)
            with self._lock:
                self.arrays |= arrays
                if entry:
                    self.entries[key] = entry
                self.records[key] = replace(record, patch=None)

    def _watch_copy(self, key: str, rows: Array) -> None:
        """Hash rows of a tensor that stays as it is."""
        feed_hash(self.digests.setdefault(key, sha256()), rows)

    def _check_beside(
        self, file: Path, output: Path, is_ours: Callable[[Path], bool], *, what: str, overwrite: bool
    ) -> None:
        """Refuse a place for the undo file or the certificate where something else would be lost or not be apart."""
        inner = _is_within(file, output)
        if inner is not None:
            if inner.as_posix() not in (NAME, CERTIFICATE) and (self.inputs.files.root / inner).exists():
                raise OptionError(f"{file}: is a file of the model", fix=f"choose another place for {what}")
            return
        check_apart(file, [("the merged model", output), *self.inputs.places()])
        if file.exists() and not overwrite:
            raise OptionError(f"{file}: exists", fix="choose another place, or give --overwrite")
        if file.exists() and not is_ours(file):
            raise OptionError(f"{file}: exists, and is not {what}", fix="choose another place")

    def _changes(self) -> dict[str, Change]:
        return {key: Change(self.inputs.dtypes[key], tensor.shape) for key, tensor in self.inputs.plan.tensors.items()}

    def _undo_arrays(self) -> dict[str, LazyArray]:
        tensors, dropped = self.inputs.files.tensors, self.inputs.plan.dropped
        dropped_arrays = {f"{key}#whole": tensors[key] for key in dropped}
        return dict(sorted({**self.arrays, **dropped_arrays}.items()))

    def _undo_content(self) -> dict[str, Any]:
        originals = self.inputs.originals()
        return {
            "version": VERSION,
            "adapters": self.adapters,
            "tensors": dict(sorted(self.entries.items())),
            "copies": {key: hashed.hexdigest() for key, hashed in sorted(self.digests.items())},
            **originals,
            "digest": text_digest(originals["headers"], originals["texts"]),
        }

    def _hash(self, records: list[TensorRecord], side: Literal["base", "merged"]) -> str | None:
        """Of a whole model; None where nothing was hashed, or nothing was copied because nothing was written."""
        tensors, dropped = self.inputs.files.tensors, self.inputs.plan.dropped
        hashed_count = len(self.digests) + len(dropped) + sum(key in tensors for key in self.records)
        if not self.hashes or hashed_count < len(tensors):
            return None
        digests = dict(self.digests)
        if side == "base":
            for key in dropped:
                digests[key] = sha256()
                feed_hash(digests[key], tensors[key].read())
        copies = {
            key: Hashed(tensors[key].dtype, tensors[key].shape, hashed.hexdigest()) for key, hashed in digests.items()
        }
        return model_hash(records, copies, side=side)


def _is_within(file: Path, folder: Path) -> Path | None:
    """The path of a file from a folder; None where it lies elsewhere."""
    real = Path(os.path.realpath(file.parent)) / file.name
    home = Path(os.path.realpath(folder))
    return real.relative_to(home) if home in real.parents else None


def _in_unfinished(file: Path, output: Path, part: Path) -> Path:
    """Where a file is written before the folder that it goes into has its name."""
    inner = _is_within(file, output)
    if inner is None:
        return file
    (part / inner).parent.mkdir(parents=True, exist_ok=True)
    return part / inner
