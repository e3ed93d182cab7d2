"""One merge in progress: it computes and measures every tensor, and writes the model and its records."""

import os
from collections.abc import Callable, Iterator
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.lazy import Array, LazyArray
from loralens.core.messages import note
from loralens.core.names import some
from loralens.errors import OptionError, place
from loralens.formats.files.atomic import atomic_file, check_apart, remove, was_killed
from loralens.formats.files.disk import check_room, sync
from loralens.formats.files.json_text import dumps
from loralens.formats.models.model_writer import CopyOptions
from loralens.formats.records.merged_files import (
    BEFORE,
    CERTIFICATE,
    FILES,
    NAME,
    Spool,
    file_sizes,
    is_certificate,
    is_undo,
    undo_size,
    write_undo,
)
from loralens.linalg.device import Device
from loralens.merging.codec import feed_hash, hash_rows, prepare
from loralens.merging.merge_plan import matrix_blocks
from loralens.merging.merge_record import (
    Hashed,
    MergedModule,
    MergeRecorder,
    TensorRecord,
    hashed_tensors,
    merged_modules,
    model_hash,
    module_entries,
    total_entry,
)
from loralens.merging.patch import Keep
from loralens.merging.undo import layout_version, pack_arrays, pack_entry, text_digest
from loralens.verbs.merges.merge_inputs import MergeInputs, copy_model, record_path
from loralens.verbs.models.texts import TextSource
from loralens.verbs.shared.adapters import name_damaged
from loralens.version import __version__

# Files that say how a model is quantised, beside config.json: of AutoGPTQ, AutoAWQ and modelopt.
SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
NO_HASH = "0" * 64  # as long as every other hash
NAMED = 5  # most files that a message names; the others are counted


class MergeRun:
    """A merge, and the measurements that its certificate and its undo file consist of.

    Parameters
    ----------
    inputs : MergeInputs
    rounding : str
    seed : int
        Seed of the random numbers for stochastic rounding.
    data : path or iterable, or None
        Texts on which the base, the unmerged and the merged model are run.
    fidelity : bool
        Measure how much of every update arrives.
    undo : bool
        Keep what restores the base; in a dry run, only find out how much that is.
    device : Device
        The device that computes the products of factors.
    """

    def __init__(
        self,
        inputs: MergeInputs,
        *,
        rounding: RoundingMode,
        seed: int,
        fidelity: bool,
        undo: bool,
        device: Device,
        data: TextSource | None = None,
    ) -> None:
        self.inputs, self.rounding, self.seed, self.device = inputs, rounding, seed, device
        self.fidelity, self.undo = fidelity, undo
        # Of a GGUF model in floats all tensors are written anew, in the order of the file and not in that of the merge.
        recast = inputs.files.gguf is not None and inputs.dtype is not None
        # Nothing but the certificate and the undo file needs the SHA-256 of every tensor.
        self.hashes = (fidelity or undo) and not recast
        # This reads all factors, so that a faulty adapter is an error before the base is read.
        self.adapters = [adapter.record() for adapter in inputs.adapters]
        # They are measured before the merge, as the certificate is written with the model.
        self.texts = None
        if data is not None:
            # Imported here, as running a model takes 20 ms to import before torch is.
            from loralens.verbs.merges.merge_on_texts import measure_on_texts

            self.texts = measure_on_texts(inputs, data, rounding=rounding, seed=seed, device=device)
        self.records: dict[str, TensorRecord] = {}
        self.digests: dict[str, Any] = {}
        self.files: dict[str, int] | None = None  # name → bytes in the written folder, for the certificate
        self._keep: Keep = count_only  # in a dry run the patches are made for their size
        self._lock = Lock()
        self._changes, self._planned = inputs.changes(), inputs.planned

    def rehearse(self) -> None:
        """Compute and measure everything, and write nothing."""
        copy_model("merging", self.inputs.files, None, changes=self._changes, fill=self._fill)

    def write(self, output: Path, *, undo: Path | None, certificate: Path | None, overwrite: bool) -> None:
        """Write the merged model, and the undo file and the certificate in its folder or elsewhere.

        Parameters
        ----------
        output : Path
        undo, certificate : Path or None
            The places of these files; None: the file is not written.
        overwrite : bool
            Replace what is at these places, if a merge wrote it.

        Raises
        ------
        OptionError
            Something else would be lost, or a place overlaps with an input.
        """
        files = self.inputs.files
        # Everything that can be refused is refused here, before the work begins.
        files.check_copyable()
        _remove_orphans(output)
        if undo:
            self._check_beside(undo, output, is_undo, what="an undo file", overwrite=overwrite)
        if certificate:
            self._check_beside(certificate, output, is_certificate, what="a certificate", overwrite=overwrite)
        # Links are followed: one file under two paths would be written twice.
        if undo and certificate and os.path.realpath(undo) == os.path.realpath(certificate):
            raise OptionError(
                f"{undo}: is given for both the undo file and the certificate",
                fix="choose another place for one of them",
            )

        def write_beside(part: Path) -> None:
            # Last, when all tensors were read: a base that changed meanwhile would give a model of two halves.
            files.check_unchanged()
            # Records outside of the model's folder take their places before the model does, which is on the disk then:
            # a model never stands without its records.
            sync(part)
            if undo:
                write_undo(self._undo_arrays, lambda: self._undo_fields(known=True), _in_unfinished(undo, output, part))
            # The undo file is in the list. The certificate is written later, as it cannot state its own size.
            if files.root.is_dir():
                self.files = file_sizes(part)
            if certificate:
                with atomic_file(_in_unfinished(certificate, output, part)) as stream:
                    stream.write(dumps(self.certificate()).encode())

        # Patches are kept on the output's disk until all are known, so that memory does not grow with the model.
        with Spool(output.absolute().parent) as spool:
            self._keep = spool.keep
            copy_model(
                "merging",
                files,
                output,
                changes=self._changes,
                fill=self._fill,
                dtype=self.inputs.dtype,
                types=self.inputs.quantised.types,
                options=CopyOptions(
                    watch=self._hash_copy if self.hashes else None,
                    # The scales and codes of weights that become floats; some codes have the key of their weight.
                    dropped=[key for key in self.inputs.plan.dropped if key not in self._changes],
                    # The key of a new tensor, of floats or of codes → a key of the base in whose shard it is stored.
                    homes={
                        **{key: weight.stored for key, weight in self.inputs.decoded.items()},
                        **{part: key for part, key in self._planned.items() if key in self.inputs.quantised.keys},
                    },
                    texts=self.inputs.texts(),
                    names=self._moved_files(),
                    write_beside=write_beside,
                    inputs=self.inputs.places(),
                    overwrite=overwrite,
                ),
            )
        if files.left_out:
            note(f"left out, as they hold weights that are not merged: {some(files.left_out, NAMED)}")

    def _moved_files(self) -> dict[str, str]:
        """The files beside the weights that get another name in the merged model."""
        companions = self.inputs.files.companions
        # The records of an earlier merge into this base wait in before/, from where unmerging moves them back.
        ours = [name for name in companions if name in (NAME, CERTIFICATE) or name.startswith(BEFORE)]
        # Programs would take a model of floats for one of codes.
        ours += [name for name in companions if self.inputs.plan.dropped and name in SETTINGS]
        return {name: BEFORE + name for name in ours}

    def undo_size(self) -> int | None:
        """The bytes of the undo file, also of one that a dry run would write; None without one."""
        return undo_size(self._undo_arrays, lambda: self._undo_fields(known=False)) if self.undo else None

    def modules(self) -> list[MergedModule]:
        """How much of the update of every module arrived; empty if that was not measured."""
        return merged_modules(self._records())

    def certificate(self) -> dict[str, Any]:
        """The certificate as a JSON object: what was merged into what, and how much of it arrived."""
        inputs, records = self.inputs, self._records()
        base, merged = self._hashes(records, "base"), self._hashes(records, "merged")
        return {
            "loralens": __version__,
            "base": {"path": inputs.base, "sha256": base and model_hash(base)},
            "result": {
                "sha256": merged and model_hash(merged),
                # So that `verify` can tell which tensors were changed since.
                "tensors": merged
                and {
                    key: {"dtype": tensor.dtype, "shape": list(tensor.shape), "sha256": tensor.digest}
                    for key, tensor in merged.items()
                },
            },
            "adapters": self.adapters,
            "names": [str(match) for match in inputs.plan.matches],
            "missing": list(inputs.plan.missing),
            "notes": list(inputs.plan.notes),
            # All that a verification needs to repeat the merge; the seed matters only for random rounding.
            "rounding": {"mode": self.rounding, **({"seed": self.seed} if self.rounding == "stochastic" else {})},
            "dtype": inputs.dtype or "keep",
            **({"bits": inputs.bits} if inputs.bits else {}),
            "modules": module_entries(merged_modules(records)),
            "total": total_entry(records, **self._kept_sizes()),
            **({} if self.texts is None else {"texts": self.texts}),
            **({} if self.files is None else {FILES: self.files}),
        }

    def _kept_sizes(self) -> dict[str, int]:
        """The bytes and weights of the tensors that the undo file keeps as they are."""
        if not self.undo:
            return {}
        nbytes = sum(self.inputs.files.tensors[key].nbytes for key in self.inputs.plan.dropped)
        # Without a dtype the codes stay, and nothing is dropped.
        weights = sum(prod(weight.shape) for weight in self.inputs.decoded.values()) if nbytes else 0
        return {"kept_bytes": nbytes, "kept_weights": weights}

    def _records(self) -> list[TensorRecord]:
        # In the order of the plan: threads finish in any order, and a certificate has to be reproducible.
        return [self.records[key] for key in self._planned if key in self.records]

    def _fill(self, key: str) -> Iterator[Array]:
        """The merged rows of one tensor. When the last of them was taken, the tensor's record is stored."""
        with place(key), name_damaged(self.inputs.labelled):
            codec = self.inputs.codec(key, self._planned[key], self.rounding, self.seed)
            watch = MergeRecorder(
                prepare(codec, device=self.device),
                hashes=self.hashes,
                fidelity=self.fidelity,
                undo=self.undo,
                keep=self._keep,
            )
            yield from watch.blocks()
            # Several threads finish their tensors here.
            with self._lock:
                self.records[key] = watch.record()

    def _hash_copy(self, key: str, rows: Array) -> None:
        """Hash the next rows of a tensor that stays as it is."""
        feed_hash(self.digests.setdefault(key, sha256()), rows)

    def _check_beside(
        self, file: Path, output: Path, is_ours: Callable[[Path], bool], *, what: str, overwrite: bool
    ) -> None:
        """Refuse a place for the undo file or the certificate if it is an input or holds a file of somebody else."""
        inner = _is_within(file, output)
        if inner is not None:
            # The folder is new, so only a copy of one of the base's files could be lost.
            if inner.as_posix() not in (NAME, CERTIFICATE) and (self.inputs.files.root / inner).exists():
                raise OptionError(f"{file}: is a file of the model", fix=f"choose another place for {what}")
            return
        check_apart(file, [("the merged model", output), *self.inputs.places()])
        check_room(file)
        # Even --overwrite replaces only what a merge wrote.
        if file.exists() and not overwrite:
            # A model that is one file has its records beside it, and then the name of the output alone was given.
            named = f"{output}: exists" if output.exists() else f"{file}: exists, and would be {what} of {output}"
            raise OptionError(named, fix="choose another place, or give --overwrite")
        if file.exists() and not is_ours(file):
            raise OptionError(f"{file}: exists, and is not {what}", fix="choose another place")

    def _hashes(self, records: list[TensorRecord], side: Literal["base", "merged"]) -> dict[str, Hashed] | None:
        """The hashes of a model; None if not every tensor was hashed, as in a dry run, which copies nothing."""
        tensors, dropped = self.inputs.files.stored, self.inputs.plan.dropped
        recorded = self._planned.keys() & self.records.keys()
        # A hash of only some tensors would look like that of the model.
        if not self.hashes or tensors.keys() - self.digests.keys() - recorded - set(dropped):
            return None
        copies = {
            key: Hashed(str(tensors[key].dtype), tensors[key].shape, digest.hexdigest())
            for key, digest in self.digests.items()
        }
        # The base has these tensors, and the merged model does not.
        for key in dropped if side == "base" else ():
            digest = hash_rows(matrix_blocks(tensors[key]))
            copies[key] = Hashed(str(tensors[key].dtype), tensors[key].shape, digest)
        return hashed_tensors(records, copies, side=side)

    def _undo_arrays(self) -> Iterator[tuple[str, LazyArray]]:
        """The arrays of the undo file in the order of their names, so that equal merges give equal bytes."""
        tensors = self.inputs.files.tensors
        # A tensor that the merged model does not have cannot be restored by a patch.
        named = {f"{key}#whole": tensors[key] for key in self.inputs.plan.dropped}
        for key, record in self.records.items():
            if record.patch:
                named |= {f"{key}{end}": array for end, array in pack_arrays(record).items()}
        yield from sorted(named.items())

    def _undo_fields(self, *, known: bool) -> Iterator[tuple[str, Any]]:
        """The fields of the undo file; if hashes are not ``known``, as in a dry run, others of their length."""
        files, dropped, originals = self.inputs.files, self.inputs.plan.dropped, self.inputs.originals()
        patched = {key: record for key, record in sorted(self.records.items()) if record.patch}
        copied = sorted(files.stored.keys() - patched.keys() - set(dropped))
        yield "version", layout_version(patched.values())
        yield "adapters", self.adapters
        yield "tensors", {key: pack_entry(record) for key, record in patched.items()}
        yield "copies", {key: self.digests.get(key, sha256()).hexdigest() if known else NO_HASH for key in copied}
        yield from originals.items()
        if dropped:
            wholes = {key: matrix_blocks(files.tensors[key]) for key in dropped}
            yield "whole", {key: hash_rows(rows) if known else NO_HASH for key, rows in wholes.items()}
        # The tensors have hashes of their own; this one is of the texts and headers.
        yield "digest", text_digest(originals["headers"], originals["texts"])


def _is_within(file: Path, folder: Path) -> Path | None:
    """The path of a file relative to a folder; None if it lies elsewhere."""
    # The file's own name is not resolved: if it is a link, the link itself is what would be replaced.
    real = Path(os.path.realpath(file.parent)) / file.name
    home = Path(os.path.realpath(folder))
    return real.relative_to(home) if home in real.parents else None


def _remove_orphans(output: Path) -> None:
    """Remove the records that a killed run left of a model that does not exist, a single file, in their usual places.

    Otherwise the same merge could not be repeated: it would refuse to replace them.
    """
    if os.path.lexists(output) or not was_killed(output):
        return
    for name, is_ours in ((NAME, is_undo), (CERTIFICATE, is_certificate)):
        file = record_path(output, name, folder=False)
        if is_ours(file):
            remove(file)


def _in_unfinished(file: Path, output: Path, part: Path) -> Path:
    """The place of a file that is written now: inside ``part``, the unfinished ``output``, or outside of it."""
    inner = _is_within(file, output)
    if inner is None:
        return file
    (part / inner).parent.mkdir(parents=True, exist_ok=True)
    return part / inner


def count_only(data: bytes) -> LazyArray:
    """An array as large as ``data``, which is not stored: a dry run needs only the size of a patch."""

    def read() -> Array:
        raise AssertionError("the bytes of this patch were only counted")

    return LazyArray(read, shape=(len(data),), dtype=np.uint8)
