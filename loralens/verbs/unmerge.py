"""The verb ``unmerge``: restores the base from a merged model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Never, Unpack

from loralens.core.lazy import Array
from loralens.core.messages import warn
from loralens.core.progress import progress
from loralens.errors import MismatchError, OptionError
from loralens.formats.records.merged import MergeSettings
from loralens.linalg.device import Device
from loralens.merging.apply import prepare_merge
from loralens.merging.low_bit.apply import CodeRounding, prepare_codes
from loralens.merging.low_bit.record import hashed_rows
from loralens.merging.low_bit.subtract import subtract_codes
from loralens.merging.plan import MergePlan
from loralens.merging.undo.subtract import Doubt, subtract_block
from loralens.tables.numbers import count
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import Reading, stated_options
from loralens.verbs.inputs.choices import Blocks, as_globs
from loralens.verbs.inputs.merge_inputs import MergeInputs, read_merge_inputs
from loralens.verbs.inputs.weighted import Weighted, weighted_sources
from loralens.verbs.outputs.merges.certified import check_subtracted
from loralens.verbs.outputs.merges.merge_run import THREADS
from loralens.verbs.outputs.merges.model_copy import bytes_of_copy, rehearse, write_copy
from loralens.verbs.outputs.merges.replay import settings_of
from loralens.verbs.outputs.merges.unmerge_run import UnmergeRun
from loralens.verbs.outputs.rules import option_names
from loralens.verbs.outputs.target import Target, Written


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

    def __repr__(self) -> str:
        return f"UnmergeResult({len(self.keys)} tensors, {'bit for bit' if self.exact else 'by subtracting'})"

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
        name: Column[str] = Column("name", str, "tensor", align="left", priority=ALWAYS)
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

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return self.listing()[0].record(self)


def unmerge(
    merged: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    undo: str | PathLike[str] | None = None,
    adapter: Weighted = (),
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    modules: Sequence[str] = (),
    block: Blocks = (),
    **reading: Unpack[Reading],
) -> UnmergeResult:
    """Restore the base that adapters were merged into.

    The undo patch restores every bit of the base, which its SHA-256 proves; the adapters are not needed. Without an
    undo file, ``adapter`` is subtracted, W = round(W' − Σ w·ΔW). Rounding gave several weights the same W', so the
    entries that this leaves uncertain are counted. For codes of a low-bit model, the stochastic rounding of the merge
    is repeated with the seed that its certificate states. Several merges are undone in reverse order.

    Parameters
    ----------
    merged : path
        The merged model.
    output : path
        The folder to write, or the file if ``merged`` is one. It may be left out in a dry run.
    undo : path, optional
        The undo file of the merge; by default the one in ``merged``, or beside it if ``merged`` is a file.
    adapter : path or Adapter, pair, mapping, or sequence of these
        The adapter that was merged: ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``. It is subtracted, and
        the undo file is not used.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``. The result has the same bits on every device.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Restore and check everything, and write nothing.
    modules : sequence of str
        Subtract only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    **reading : Reading
        How ``adapter`` is read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        ``output`` is missing, options exclude each other, or there is no such device.
    MismatchError
        The undo file belongs to another model, the model was changed since, or the merge cannot be subtracted. For
        codes of a low-bit model also: the certificate names another adapter or another weight.
    FormatError
        A file cannot be read.
    """
    modules = as_globs(modules, block)
    # () and an empty list from the command line mean that no adapter was given; an empty text is a wrong path.
    subtracting = isinstance(adapter, str | PathLike) or bool(adapter)
    misplaced = [*(["modules"] if modules else []), *stated_options(reading)]
    # Silently restoring all modules would not be what the user asked for.
    if misplaced and not subtracting:
        raise OptionError(
            f"{option_names(misplaced[0])} goes with --adapter: an undo file restores everything", fix="leave it out"
        )
    if output is None and not dry_run:
        raise OptionError("no output is given for the base", fix="give -o OUT (output), or --dry-run")
    compute_device = Device.of(device)  # a device that does not exist is refused before the work
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    sources = weighted_sources([adapter]) if subtracting else []
    if sources:
        # Both would give a base, and they may differ: by rounding, or because they belong to two merges.
        if undo is not None:
            raise OptionError("--undo and --adapter exclude each other", fix="give one of them")
        # untie=False: subtracting must not split a weight that the merged model shares.
        settings = settings_of(Path(merged))
        in_codes = settings.bits == "keep" and settings.rounding == "stochastic"
        inputs = read_merge_inputs(
            sources, merged, reading, modules=modules, untie=False, bits="keep" if in_codes else None, decoded=True
        )
        if inputs.decoded:
            _refuse_codes(merged, settings)
        # Of chosen modules the fingerprint is another one, so there is nothing to compare.
        if not modules:
            check_subtracted(Path(merged), inputs)
        doubt = _subtract(inputs, target, compute_device, settings.seed or 0)
        # An entry that no weight is rounded to proves that another merge, or a later change, wrote it.
        if doubt.none:
            warn("this model was not made by merging this adapter, or was changed since")
        return UnmergeResult(str(merged), target, False, list(inputs.plan.tensors), doubt)
    run = UnmergeRun(Path(merged), None if undo is None else Path(undo), compute_device)
    if target.written is None:
        run.rehearse()
    else:
        run.write(target.written, overwrite=overwrite)
    # Tensors that the merged model does not have are restored too.
    return UnmergeResult(str(merged), target, True, list({**run.undo.entries, **run.undo.dropped}))


def _subtract(inputs: MergeInputs, target: Target, device: Device, seed: int) -> Doubt:
    """Subtract the update from every adapted tensor, and count the entries that are uncertain."""
    _check_subtractable(inputs.plan)
    tensors, planned, changes = inputs.plan.tensors, inputs.planned, inputs.changes()
    # One for each tensor, since several threads count at the same time.
    doubts = {key: Doubt() for key in planned}

    def subtract(written: str) -> Iterator[Array]:
        key = planned[written]
        weight = inputs.coded.get(key)
        if weight is None:
            blocks = prepare_merge(tensors[key], device=device).blocks()
            return (subtract_block(block, doubts[written]) for block in blocks)
        merge = prepare_codes(tensors[key], weight, CodeRounding(seed=seed, key=key), device=device)
        codes = subtract_codes(merge, doubts[written])
        return hashed_rows(weight, codes, None, ordered=inputs.files.gguf is not None)

    if target.written is None:
        rehearse("subtracting", subtract, changes)
    else:
        with progress("subtracting", bytes_of_copy(inputs.files, changes)) as step:
            write_copy(
                inputs.files,
                target.written,
                changes=changes,
                fill=subtract,
                inputs=inputs.places("the merged model"),
                overwrite=target.overwrite,
                threads=THREADS,
                step=step,
            )
    return Doubt(*(sum(getattr(doubt, name) for doubt in doubts.values()) for name in ("entries", "several", "none")))


def _refuse_codes(merged: str | PathLike[str], settings: MergeSettings) -> Never:
    """Refuse to subtract from codes that do not show where they came from.

    Raises
    ------
    OptionError
        The message says why: the rounding, or a certificate that is missing.
    """
    if settings.bits == "keep" and settings.rounding == "nearest":
        way = "rounding to the nearest code, which only the undo file takes back, and not --adapter"
        raise OptionError(f"{merged}: its codes were moved by {way}", fix="leave out --adapter, or take the base")
    what = f"{merged}: its weights are quantised, and an update cannot be subtracted from codes"
    raise OptionError(f"{what} unless a certificate says how they were rounded", fix="give the undo file")


def _check_subtractable(plan: MergePlan) -> None:
    """Refuse a merge that replaced or scaled a weight, which subtracting cannot undo.

    Raises
    ------
    MismatchError
        The message names the tensor.
    """
    # A replaced weight keeps nothing of the base's, and the gain of DoRA, m/‖W + ΔW‖, cannot be computed without W.
    for tensor in plan.tensors.values():
        if tensor.replacement is not None or tensor.tokens or any(slab.magnitude for slab in tensor.slabs):
            raise MismatchError(
                f"{tensor.key} was replaced or scaled (DoRA) by the merge: subtracting does not give it back",
                fix="unmerge with --undo, or get the base model again",
            )


# None of the columns has a title: people read the sentence, and the row is for JSON, CSV and data frames.
COLUMNS: tuple[Column[UnmergeResult], ...] = (
    Column("merged", lambda row: row.merged),
    Column("output", lambda row: row.target.record()),
    Column("exact", lambda row: row.exact),
    Column("tensors", lambda row: len(row.keys)),
)
# Only where the update was subtracted; an undo file leaves nothing open.
DOUBT_COLUMNS: tuple[Column[UnmergeResult], ...] = (
    Column("entries", lambda row: row.doubt and row.doubt.entries),
    Column("several", lambda row: row.doubt and row.doubt.several),
    Column("none", lambda row: row.doubt and row.doubt.none),
)
