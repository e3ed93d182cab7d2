"""The verb ``unmerge``: restores the base from a merged model."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from typing import Any

from loralens.core.lazy import Array
from loralens.core.messages import warn
from loralens.core.names import some
from loralens.errors import FormatError, MismatchError, MissingFileError, OptionError, place
from loralens.exports import takes_options
from loralens.formats.models.checkpoint import open_checkpoint
from loralens.formats.models.model_files import CONFIG, check_index, model_files, offsets_of, resolve_path
from loralens.formats.models.model_writer import Change, CopyOptions
from loralens.formats.records.merged_files import BEFORE, CERTIFICATE, NAME, is_certificate, read_undo
from loralens.linalg.device import Device
from loralens.merging.codec import feed_hash, prepare
from loralens.merging.merge_plan import MergePlan, matrix_blocks
from loralens.merging.undo import WITH_CODES, Doubt, parse_undo, restore_tensor, subtract_tensor
from loralens.tables.numbers import count
from loralens.tables.table import Column, Columns, Keys, Table, label_column
from loralens.verbs.files.output import Target, Written
from loralens.verbs.merges.merge_inputs import (
    MergeInputs,
    check_subtracted,
    copy_model,
    read_merge_inputs,
    record_path,
    warn_if_killed,
)
from loralens.verbs.shared.adapters import Weighted, check_on_disk, weighted_sources
from loralens.verbs.shared.options import ModuleChoice, Reading, option_names

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
        self.file = file = undo or record_path(merged, NAME)
        _check_undo_file(file, merged, is_given=undo is not None)
        arrays, content = read_undo(file)
        self.files = model_files(root)
        self.tensors = self.files.stored
        self._digests: dict[str, Any] = {}
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

    def run(self, target: Target) -> None:
        """Write the base, which appears only if every tensor of it is proven by its SHA-256; or only prove them.

        Raises
        ------
        MismatchError, FormatError
            A tensor is not as the merge wrote it, or the restored tensor is not that of the base.
        """
        files, undo = self.files, self.undo
        changes = {key: Change(*undo.outline(key)) for key in (*undo.entries, *undo.dropped)}
        if target.written is None:
            copies = {key: self.tensors[key] for key in undo.copies if key not in changes}
            with place(self.merged):
                copy_model("unmerging", files, None, changes=changes, fill=self._fill, copies=copies)
                self._check_copies(self.file)
            return
        files.check_copyable()
        folder = files.root.is_dir()
        # A single file may have another name now than when it was merged.
        names = list(undo.headers) if folder else [files.shards[0].name]
        headers = (text.encode("utf-8") for text in undo.headers.values())
        with self._naming_output(target.written):
            copy_model(
                "unmerging",
                files,
                target.written,
                changes=changes,
                fill=self._fill,
                options=CopyOptions(
                    watch=self._hash_copy,
                    # A safetensors header begins with its length in 8 bytes. The rest is kept to the byte, because
                    # another spelling of the same JSON would be another file.
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
                    overwrite=target.overwrite,
                ),
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

    def _fill(self, key: str) -> Iterator[Array]:
        """The rows of one tensor of the base; those of a copied tensor are hashed."""
        with place(key):
            if key in self.undo.dropped:
                digest = sha256()
                for rows in matrix_blocks(self.undo.dropped[key]):
                    feed_hash(digest, rows)
                    yield rows
                if self.undo.dropped_hashes.get(key, digest.hexdigest()) != digest.hexdigest():
                    raise MismatchError("is not the tensor of the base", fix=DAMAGED)
            elif key in self.undo.entries:
                undo = self.undo.tensor(key)
                weight = self._coded.get(undo.weight)
                yield from restore_tensor(undo, self.tensors[key], weight=weight, device=self.device)
            else:
                tensor = self.tensors[key]
                for rows in matrix_blocks(tensor):
                    self._hash_copy(key, rows)
                    yield rows

    def _hash_copy(self, key: str, rows: Array) -> None:
        feed_hash(self._digests.setdefault(key, sha256()), rows)

    def _check_copies(self, _: Path) -> None:
        """Refuse a model that was changed while it was read, or a tensor that was changed since the merge."""
        self.files.check_unchanged()
        for key, digest in self.undo.copies.items():
            if key in self._digests and self._digests[key].hexdigest() != digest:
                raise MismatchError(f"{key} is not as it was merged: it was changed since", fix=LATER)


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
    raise MissingFileError(
        f"{merged}: its undo file {file} does not exist",
        fix=f"{ways}; a model into which nothing was merged has nothing to undo",
    )


@dataclass(frozen=True, slots=True, repr=False)
class UnmergeResult(Written):
    """The base that was restored from a merged model, and how certain it is.

    Attributes
    ----------
    merged : str
        The path of the merged model.
    exact : bool
        True if an undo file restored every bit, False if the update was subtracted.
    keys : sequence of str
        The tensors that were restored.
    doubt : Doubt or None
        The numbers of uncertain entries, if the update was subtracted.
    """

    merged: str
    target: Target
    exact: bool
    keys: Sequence[str]
    doubt: Doubt | None = None

    @property
    def answer(self) -> bool:
        """Whether this can be the base: the merge could have written every entry of the merged model."""
        return self.doubt is None or not self.doubt.none

    def listing(self) -> list[Table["UnmergeResult"]]:
        """The result as a table of one row."""
        return [Table("", COLUMNS if self.doubt is None else (*COLUMNS, *DOUBT_COLUMNS), [self])]

    def conclusion(self) -> list[str]:
        """What was restored, and how certain it is."""
        if self.doubt is None:
            return [self.target.conclusion(f"the base of {self.merged}, bit for bit")]
        doubt, of = self.doubt, f"of {self.doubt.entries:,} entries could have come from"
        if not doubt.none:
            # Nothing proves that the nearest of several weights is the one of the base.
            what = "an estimate of the base" if doubt.several else "the base"
            sentences = [
                self.target.conclusion(f"{what} of {self.merged}, by subtracting"),
                f"{doubt.several:,} {of} several weights.",
            ]
            if doubt.several:
                sentences.append("There it may differ from the base; only the undo file gives the base bit for bit.")
            return sentences
        return [
            self.target.conclusion(f"{self.merged} without the update, which is not its base"),
            f"{doubt.none:,} {of} no weight, and {doubt.several:,} from several.",
        ]

    def tables(self) -> list[Table[str]]:
        """The tensors that were restored."""
        name: Column[str] = label_column("name", "tensor", str)
        done = "subtracted" if self.doubt else "restored, the SHA-256 of each checked"
        # Each of them is as it should be, so their number is enough unless they are asked for.
        return [
            Table(
                f"{count(len(self.keys), 'tensor')} {done}",
                [name],
                self.keys,
                uneventful=lambda _: True,
                sum_up=lambda tensors: f"{count(tensors, 'tensor')} {done}",
            )
        ]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (*COLUMNS, *DOUBT_COLUMNS)


@takes_options
def unmerge(
    merged: str | PathLike[str],
    *,
    target: Target,
    undo: str | PathLike[str] | None = None,
    adapter: Weighted = (),
    device: str = "cpu",
    selection: ModuleChoice,
    reading: Reading,
) -> UnmergeResult:
    """Restore the base that adapters were merged into.

    The undo patch restores every bit of the base, which its SHA-256 proves. With ``adapter`` the update is subtracted
    instead, and the entries that rounding leaves uncertain are counted. Several merges are undone in reverse order. If
    the models are single files, keep the undo file of every merge.

    Parameters
    ----------
    merged : path
        The merged model.
    undo : path, optional
        The undo patch of the merge, which restores every bit. [default: undo.loralens in MERGED; for a file MERGED.gguf
        MERGED.undo.loralens]
    adapter : path, Adapter or model, pair, mapping, or sequence of these
        The adapter that was merged, with weight W. It is subtracted, and no undo patch is used.

        ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``.
    device : str
        The device for computations on W: cpu, cuda or cuda:N. The result has the same bits on every device.
    output : path, optional
        Where the base is written: a folder, or a file if MERGED is one.
    target : Target
        The options ``output``, ``overwrite``, ``dry_run``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        ``output`` is missing, options exclude each other, or there is no such device.
    MismatchError
        The undo file belongs to another model, the model was changed since, or the merge cannot be subtracted.
    FormatError
        A file cannot be read.

    Notes
    -----
    Without an undo file, ``adapter`` is subtracted, W = round(W' − Σ w·ΔW). Rounding gave several weights the same W',
    so the entries that this leaves uncertain are counted. The codes of a quantised model need their undo file.
    Several merges are undone in reverse order.

    Examples
    --------
    $ loralens unmerge merged -o restored
    """
    check_on_disk(merged)
    modules = selection.globs
    # () and an empty list from the command line mean that no adapter was given; an empty text is a wrong path.
    subtracting = isinstance(adapter, str | PathLike) or bool(adapter)
    misplaced = [*(["modules"] if modules else []), *reading.stated]
    # Silently restoring all modules would not be what the user asked for.
    if misplaced and not subtracting:
        raise OptionError(
            f"{option_names(misplaced[0])} goes with --adapter: an undo file restores everything", fix="leave it out"
        )
    if not target.is_wanted:
        raise OptionError("no output is given for the base", fix="give -o OUT, or --dry-run")
    compute_device = Device.of(device)  # a device that does not exist is refused before the work
    sources = weighted_sources([adapter]) if subtracting else []
    if sources:
        # Both would give a base, and they may differ: by rounding, or because they belong to two merges.
        if undo is not None:
            raise OptionError("--undo and --adapter exclude each other", fix="give one of them")
        # untie=False: subtracting must not split a weight that the merged model shares.
        inputs = read_merge_inputs(sources, merged, reading, modules=modules, untie=False, decoded=True)
        if inputs.decoded:
            what = f"{merged}: its weights are quantised, and an update cannot be subtracted from codes"
            raise OptionError(what, fix="give the undo file, or take the base")
        # Of chosen modules the fingerprint is another one, so there is nothing to compare.
        if not modules:
            check_subtracted(Path(merged), inputs)
        doubt = _subtract(inputs, target, compute_device)
        # An entry that no weight is rounded to proves that another merge, or a later change, wrote it.
        if doubt.none:
            warn("this model was not made by merging this adapter, or was changed since")
        return UnmergeResult(str(merged), target, False, list(inputs.plan.tensors), doubt)
    run = UnmergeRun(Path(merged), None if undo is None else Path(undo), compute_device)
    run.run(target)
    # Tensors that the merged model does not have are restored too.
    return UnmergeResult(str(merged), target, True, list({**run.undo.entries, **run.undo.dropped}))


def _subtract(inputs: MergeInputs, target: Target, device: Device) -> Doubt:
    """Subtract the update from every adapted tensor, and count the entries that are uncertain."""
    _check_subtractable(inputs.plan)
    planned, changes = inputs.planned, inputs.changes()
    # One for each tensor, since several threads count at the same time.
    doubts = {key: Doubt() for key in planned}

    def subtract(written: str) -> Iterator[Array]:
        key = planned[written]
        return subtract_tensor(prepare(inputs.codec(written, key, "nearest", 0), device=device), doubts[written])

    copy_model(
        "subtracting",
        inputs.files,
        target.written,
        changes=changes,
        fill=subtract,
        options=CopyOptions(inputs=inputs.places("the merged model"), overwrite=target.overwrite),
    )
    return Doubt(*(sum(getattr(doubt, name) for doubt in doubts.values()) for name in ("entries", "several", "none")))


def _check_subtractable(plan: MergePlan) -> None:
    """Refuse a merge that replaced or scaled a weight, which subtracting cannot undo.

    Raises
    ------
    MismatchError
        The message names the tensor.
    """
    # A replaced weight keeps nothing of the base's, and the gain of DoRA, m/‖W + ΔW‖, cannot be computed without W.
    for tensor in plan.tensors.values():
        if tensor.replacement is not None or tensor.tokens or any(segment.magnitude for segment in tensor.segments):
            raise MismatchError(
                f"{tensor.key} was replaced or scaled (DoRA) by the merge: subtracting does not give it back",
                fix="unmerge with --undo, or get the base model again",
            )


# None of the columns has a title: people read the sentence, and the row is for JSON, CSV and data frames.
COLUMNS: Columns[UnmergeResult] = (
    Column("merged"),
    Column("output", "target.written"),
    Column("exact"),
    Column("tensors", "keys.len", type=int),
)


# Only where the update was subtracted; an undo file leaves nothing open.
def _doubt_column(key: str) -> Column[UnmergeResult]:
    return Column(key, lambda row: getattr(row.doubt, key) if row.doubt else ..., type=int, may_lack=True)


DOUBT_COLUMNS = [*map(_doubt_column, ("entries", "several", "none"))]
