"""One merge in progress: it computes and measures every tensor, and writes the model and its records."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from hashlib import sha256
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal, final

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.lazy import Array, LazyArray
from loralens.core.messages import note, progress
from loralens.core.names import some
from loralens.core.threads import processor_count
from loralens.errors import OptionError, place
from loralens.formats.files.atomic import atomic_file, check_apart, remove, reserve, tidy, was_killed
from loralens.formats.files.disk import check_room, disk_errors, sync, sync_folder
from loralens.formats.files.json_text import dumps
from loralens.formats.files.writing import name_target
from loralens.formats.models.model_writer import CopyOptions
from loralens.formats.records.merged import (
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
from loralens.merging.patch import Keep, keep_in_memory
from loralens.merging.plan import matrix_blocks
from loralens.merging.record import (
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
from loralens.merging.undo import layout_version, pack_arrays, pack_entry, text_digest
from loralens.verbs.merges.merge_inputs import MergeInputs, record_path
from loralens.verbs.merges.model_copy import bytes_of_copy, rehearse, write_copy
from loralens.verbs.models.texts import TextSource
from loralens.verbs.shared.weighted import name_damaged
from loralens.version import __version__

THREADS = processor_count()
# Files that say how a model is quantised, beside config.json: of AutoGPTQ, AutoAWQ and modelopt.
SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
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
        # In a dry run the patches are made for their size.
        self.undo_content = UndoContent(inputs, self.adapters, count_only) if undo else None
        self.files: dict[str, int] | None = None  # name → bytes in the written folder, for the certificate
        self.written: tuple[Path | None, Path | None] = None, None  # the undo file and the certificate
        self._lock = Lock()
        self._changes, self._planned = inputs.changes(), inputs.planned

    def rehearse(self) -> None:
        """Compute and measure everything, and write nothing."""
        rehearse("measuring", self._fill, self._changes)

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
        outside = [file for file in (undo, certificate) if file and _is_within(file, output) is None]
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

        self.written = undo, certificate

        def write_beside(part: Path) -> None:
            # Last, when all tensors were read: a base that changed meanwhile would give a model of two halves.
            files.check_unchanged()
            # Records outside of the model's folder wait under hidden names until the whole model is on the disk.
            waiting = {file: stack.enter_context(_hidden_beside(file)) for file in outside}
            if undo and self.undo_content:
                digests = {key: digest.hexdigest() for key, digest in self.digests.items()}
                self.undo_content.write(waiting.get(undo) or _in_unfinished(undo, output, part), digests)
            # The undo file is in the list. The certificate is written later, as it cannot state its own size.
            if files.root.is_dir():
                self.files = file_sizes(part)
            if certificate:
                with atomic_file(waiting.get(certificate) or _in_unfinished(certificate, output, part)) as stream:
                    stream.write(dumps(self.certificate()).encode())
            # Now only renames are left, that of the model the last one: a model never stands without its records.
            if waiting:
                sync(part)
            for file, complete in waiting.items():
                with place(file), disk_errors():
                    complete.replace(file)
                    sync_folder(file.parent)

        total = bytes_of_copy(files, self._changes, self.inputs.dtype, self.inputs.quantised.types)
        # Patches are kept on the output's disk until all are known, so that memory does not grow with the model.
        with ExitStack() as stack, Spool(output.absolute().parent) as spool, progress("merging", total) as step:
            if self.undo_content:
                self.undo_content.keep = spool.keep
            write_copy(
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
                    threads=THREADS,
                    step=step,
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
        file = self.written[0]
        if file:
            return file.stat().st_size
        return self.undo_content.size() if self.undo_content else None

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
                keep=self.undo_content.keep if self.undo_content else keep_in_memory,
            )
            yield from watch.blocks()
            record = watch.record()
            # Several threads finish their tensors here.
            with self._lock:
                if self.undo_content and record.patch:
                    self.undo_content.take(key, record)
                # Without the patch, which the undo file has.
                self.records[key] = replace(record, patch=None)

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


def _is_within(file: Path, folder: Path) -> Path | None:
    """The path of a file relative to a folder; None if it lies elsewhere."""
    # The file's own name is not resolved: if it is a link, the link itself is what would be replaced.
    real = Path(os.path.realpath(file.parent)) / file.name
    home = Path(os.path.realpath(folder))
    return real.relative_to(home) if home in real.parents else None


@contextmanager
def _hidden_beside(file: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside a file, which is removed after the block."""
    tidy(file)
    with reserve(file, folder=True) as folder, name_target(file, folder / file.name):
        yield folder / file.name


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
    """The place inside ``part``, the unfinished ``output``, of a file that lies inside ``output``."""
    inner = _is_within(file, output)
    assert inner is not None
    (part / inner).parent.mkdir(parents=True, exist_ok=True)
    return part / inner


# A hash that is not known in a dry run, which copies nothing. It is as long as every other one.
NO_HASH: Final = "0" * 64


@final
class UndoContent:
    """Collects what restores the base, tensor by tensor.

    Parameters
    ----------
    inputs : MergeInputs
    adapters : list of dict
        The adapters as JSON objects.
    keep : callable
        Stores parts of the patches (see `PatchWriter`).
    """

    def __init__(self, inputs: MergeInputs, adapters: list[dict[str, Any]], keep: Keep) -> None:
        self.keep = keep
        self._inputs, self._adapters = inputs, adapters
        self._records: dict[str, TensorRecord] = {}

    def take(self, key: str, record: TensorRecord) -> None:
        """Add the record of one stored tensor, with its patch."""
        self._records[key] = record

    def write(self, path: Path, digests: Mapping[str, str]) -> None:
        """Write the undo file; ``digests`` has the SHA-256 of every tensor that was copied."""
        tensors = self._inputs.files.tensors
        dropped = {key: hash_rows(matrix_blocks(tensors[key])) for key in self._inputs.plan.dropped}
        write_undo(self._arrays, lambda: self._content(digests, dropped), path)

    def size(self) -> int:
        """The bytes of the undo file that a dry run does not write."""
        dropped = self._inputs.plan.dropped
        copied = self._inputs.files.stored.keys() - self._records.keys() - set(dropped)
        content = dict.fromkeys(copied, NO_HASH), dict.fromkeys(dropped, NO_HASH)
        return undo_size(self._arrays, lambda: self._content(*content))

    def _arrays(self) -> Iterator[tuple[str, LazyArray]]:
        """The arrays of all tensors in the order of their names, so that equal merges give equal bytes.

        Each name is made when its turn comes: they hold the key of a tensor several times, and take more memory than
        the adapter if keys are long.
        """
        # A tensor that the merged model does not have cannot be restored by a patch.
        dropped, tensors = set(self._inputs.plan.dropped), self._inputs.files.tensors
        keys = self._records.keys() | dropped
        # With the letter that follows it in a name, a key has the place of its names, unless that letter is in a key.
        groups = [[key] for key in sorted(keys, key=lambda key: f"{key}#")]
        if any("#" in key for key in keys):
            groups = [list(keys)]
        for group in groups:
            named = {f"{key}#whole": tensors[key] for key in group if key in dropped}
            for key in group:
                if key in self._records:
                    named |= {f"{key}{end}": array for end, array in pack_arrays(self._records[key]).items()}
            yield from sorted(named.items())

    def _content(self, digests: Mapping[str, str], dropped: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """The fields of the undo file; the arguments are the hashes of copied and of dropped tensors."""
        originals = self._inputs.originals()
        yield "version", layout_version(self._records.values())
        yield "adapters", self._adapters
        yield "tensors", ((key, pack_entry(self._records[key])) for key in sorted(self._records))
        yield "copies", dict(sorted(digests.items()))
        for name, value in originals.items():
            yield name, iter(value.items()) if isinstance(value, dict) else value
        if dropped:
            yield "whole", dropped
        # The tensors have hashes of their own; this one is of the texts and headers.
        yield "digest", text_digest(originals["headers"], originals["texts"])


def count_only(data: bytes) -> LazyArray:
    """An array as large as ``data``, which is not stored: a dry run needs only the size of a patch."""

    def read() -> Array:
        raise AssertionError("the bytes of this patch were only counted")

    return LazyArray(read, shape=(len(data),), dtype=np.uint8)
