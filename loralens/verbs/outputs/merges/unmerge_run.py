"""One unmerge in progress, by an undo patch: it restores the changed tensors, and checks all others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loralens.core.hashes import Hasher, sha256
from loralens.core.lazy import Array
from loralens.core.names import some
from loralens.core.progress import progress
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats.files.shards import check_index
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.models.model_files import CONFIG, model_files, offsets_of
from loralens.formats.models.model_location import resolve_path
from loralens.formats.models.model_writer import Change
from loralens.formats.records.merged import BEFORE, CERTIFICATE, is_certificate
from loralens.formats.records.undo import NAME, read_undo
from loralens.linalg.device import Device
from loralens.merging.low_bit.restore import restore_codes
from loralens.merging.matrix import matrix_blocks
from loralens.merging.record import feed_hash
from loralens.merging.undo.layout import WITH_CODES, parse_undo
from loralens.merging.undo.restore import restore_tensor
from loralens.verbs.inputs.merge_inputs import record_path
from loralens.verbs.outputs.merges.merge_run import THREADS
from loralens.verbs.outputs.merges.model_copy import bytes_of_copy, rehearse, warn_if_killed, write_copy

# Three remedies for three faults: a file that no merge wrote, a damaged file, and the right file for another state.
ANOTHER = "give the undo file of the merge that wrote this model, undamaged"
DAMAGED = "the undo file is damaged, or of another model: use another copy"
LATER = "give the model that this undo file was written for; adapters merged later are unmerged first"


class UnmergeRun:
    """A merged model and its undo file.

    Parameters
    ----------
    merged : Path
    undo : Path or None
        The undo file; by default the one in the model's folder, or beside a model that is a single file.
    device : Device
        The device that computes the products of factors.

    Raises
    ------
    MismatchError
        The names of tensors and shards show that the two do not belong together.
    FormatError
        The undo file is damaged, or would replace a file that no merge changes.
    """

    def __init__(self, merged: Path, undo: Path | None, device: Device) -> None:
        self.device, self.merged = device, str(merged)
        root = resolve_path(merged)
        self.file = file = undo or usual_undo_file(merged)
        _check_undo_file(file, merged, is_given=undo is not None)
        arrays, content = read_undo(file)
        self.files = model_files(root)
        self.tensors = self.files.stored
        self._digests: dict[str, Hasher] = {}
        # Only the whole checkpoint shows whether its weights are codes: by its configuration, and by the tensors that
        # store each weight.
        self._coded = open_checkpoint(root).coded if content.get("version") == WITH_CODES else {}
        with place(file):
            self.undo = parse_undo(arrays, content)
            # Only names are compared here; numbers are proven by their hashes while they are restored.
            missing = [key for key in (*self.undo.entries, *self.undo.copies) if key not in self.tensors]
            if missing or len(self.undo.headers) != len(self.files.shards):
                what = f"{merged} has no {missing[0]}, which was merged" if missing else f"{merged} has other shards"
                raise MismatchError(what, fix="give the model that this undo file was written for")
            self._check_names()
            # Asked for the tensors of the base: the merged model may also have a head that the merge untied.
            described = {*self.undo.entries, *self.undo.copies, *self.undo.dropped}
            unknown = [key for key in self._base_keys() if key not in described]
            if unknown:
                raise MismatchError(f"says nothing about {unknown[0]}, which the base has", fix=DAMAGED)

    def _check_names(self) -> None:
        """Refuse an undo file that would replace other files than a merge changes.

        An undo file may come from anybody. Besides numbers it may only restore the configuration and the indices of the
        merged model, so that it cannot write anywhere else.

        Raises
        ------
        FormatError
            It has the text of another file, or an index whose shards lie elsewhere.
        MismatchError
            Its headers belong to other shards.
        """
        # A model that is a single file has no other files.
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

    def _base_keys(self) -> list[str]:
        """The keys of all tensors of the base, from the headers of its shards."""
        # A merge changes no header of a GGUF file.
        if self.files.gguf:
            return list(self.tensors)
        # These are all errors that a header of wrong types, values or depth can cause.
        try:
            headers = [offsets_of(text.encode("utf-8")) for text in self.undo.headers.values()]
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
            raise FormatError("its headers are damaged", fix=DAMAGED) from error
        shards = zip(self.files.shards, headers, strict=True)
        return [shard.prefix + key for shard, header in shards for key in header]

    def write(self, output: Path, *, overwrite: bool) -> None:
        """Write the base. It appears only if every tensor of it is proven by its SHA-256.

        Raises
        ------
        MismatchError, FormatError
            A tensor is not as the merge wrote it, or the restored tensor is not that of the base.
        """
        files, undo = self.files, self.undo
        files.check_copyable()
        folder = files.root.is_dir()
        # A single file may have another name now than when it was merged.
        names = list(undo.headers) if folder else [files.shards[0].name]
        headers = (text.encode("utf-8") for text in undo.headers.values())
        changes = self._changes()
        with self._naming_output(output), progress("unmerging", bytes_of_copy(files, changes)) as step:
            write_copy(
                files,
                output,
                changes=changes,
                fill=self._fill,
                watch=self._hash_copy,
                # A safetensors header begins with its length in 8 bytes. The rest is kept to the byte, because another
                # spelling of the same JSON would be another file.
                headers={
                    name: len(data).to_bytes(8, "little") + data for name, data in zip(names, headers, strict=True)
                },
                texts=undo.texts if folder else {},
                # The base had no undo file and no certificate of this merge. Those of an earlier merge into the
                # base come back from before/.
                without=(NAME, CERTIFICATE),
                names={name: name.removeprefix(BEFORE) for name in files.companions if name.startswith(BEFORE)},
                # When all tensors were read, and before the folder gets its name.
                write_beside=self._check_copies,
                inputs=[("the merged model", files.root), ("the undo file", self.file)],
                overwrite=overwrite,
                threads=THREADS,
                step=step,
            )

    @contextmanager
    def _naming_output(self, output: Path) -> Iterator[None]:
        """Name the merged model where the writer names its output: what differs is in the model that was read."""
        try:
            yield
        except MismatchError as error:
            warn_if_killed(self.files.root)
            if error.where[:1] == (str(output),):
                error.where = error.where[1:]
            raise error.at(self.merged) from None

    def rehearse(self) -> None:
        """Restore and prove every tensor of the base, and write nothing.

        Raises
        ------
        MismatchError, FormatError
            As in `write`.
        """
        changes = self._changes()
        copies = {key: self.tensors[key] for key in self.undo.copies if key not in changes}
        with place(self.merged):
            rehearse("checking", self._fill, changes, copies=copies)
            self._check_copies(self.file)

    def _changes(self) -> dict[str, Change]:
        return {key: Change(*self.undo.outline(key)) for key in (*self.undo.entries, *self.undo.dropped)}

    def _fill(self, key: str) -> Iterator[Array]:
        """The rows of one tensor of the base; those of a copied tensor are hashed."""
        with place(key):
            if key in self.undo.dropped:
                yield from self._dropped_rows(key)
            elif key in self.undo.entries:
                undo = self.undo.tensor(key)
                if undo.weight:
                    yield from restore_codes(
                        undo,
                        self._coded.get(undo.weight),
                        self.tensors[key],
                        ordered=self.files.gguf is not None,
                    )
                else:
                    yield from restore_tensor(undo, self.tensors[key], device=self.device)
            else:
                tensor = self.tensors[key]
                for rows in matrix_blocks(tensor):
                    self._hash_copy(key, rows)
                    yield rows

    def _dropped_rows(self, key: str) -> Iterator[Array]:
        """The rows of a tensor that the merged model does not have."""
        digest = sha256(self.undo.dropped[key].nbytes)
        for rows in matrix_blocks(self.undo.dropped[key]):
            feed_hash(digest, rows)
            yield rows
        if self.undo.dropped_hashes.get(key, digest.hexdigest()) != digest.hexdigest():
            raise MismatchError("is not the tensor of the base", fix=DAMAGED)

    def _hash_copy(self, key: str, rows: Array) -> None:
        feed_hash(self._digests.setdefault(key, sha256(self.tensors[key].nbytes)), rows)

    def _check_copies(self, _: Path) -> None:
        """Refuse a model that was changed while it was read, or a tensor that was changed since the merge."""
        self.files.check_unchanged()
        for key, digest in self.undo.copies.items():
            if key in self._digests and self._digests[key].hexdigest() != digest:
                raise MismatchError(f"{key} is not as it was merged: it was changed since", fix=LATER)


def usual_undo_file(merged: Path) -> Path:
    """The place of the undo file of a model: in its folder, or beside a model that is a single file."""
    root = resolve_path(merged)
    return record_path(root, NAME, folder=root.is_dir())


def _check_undo_file(file: Path, merged: Path, *, is_given: bool) -> None:
    """Refuse a certificate in place of an undo file, and say what can be done if the usual undo file is missing.

    Raises
    ------
    OptionError
        The message names the ways out.
    """
    if is_certificate(file):
        raise OptionError(
            f"{file}: is the certificate of the merge, not its undo file",
            fix=f"give the file that ends with {NAME}, or leave out --undo if it lies in the usual place",
        )
    if is_given or file.is_file():
        return
    ways = "give --undo FILE, or --adapter with the adapter that was merged"
    # A model that is one file has no place for the records of earlier merges: they keep the names of their outputs.
    undo_files = sorted(other.name for other in file.parent.glob(f"*.{NAME}"))
    if undo_files:
        ways += f"; for an earlier merge give the undo file that has the name of its output (here: {some(undo_files)})"
    raise OptionError(
        f"{merged}: its undo file {file} does not exist",
        fix=f"{ways}; a model into which nothing was merged has nothing to undo",
    )
