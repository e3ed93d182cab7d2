"""The verb ``unmerge``: restores the base from a merged model."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from loralens.core.lazy import Array
from loralens.core.messages import warn
from loralens.core.progress import progress
from loralens.core.threads import in_threads
from loralens.errors import MismatchError, OptionError
from loralens.formats.models.model_writer import Change, copy_bytes, write_model
from loralens.linalg.device import Device
from loralens.merging.apply import prepare_merge
from loralens.merging.plan import MergePlan
from loralens.merging.undo.subtract import Doubt, subtract_block
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Table
from loralens.verbs.inputs.adapters import Reading, stated_options
from loralens.verbs.inputs.merge_inputs import MergeInputs, read_merge_inputs
from loralens.verbs.inputs.weighted import Weighted, weighted_sources
from loralens.verbs.outputs.rules import option_names
from loralens.verbs.outputs.unmerge_run import UnmergeRun

THREADS = os.cpu_count() or 1


@dataclass(frozen=True, slots=True, repr=False)
class UnmergeResult(Tabular):
    """What became of a merged model.

    Attributes
    ----------
    output : Path or None
        Where the base is, or would be.
    dry_run : bool
        Whether nothing was written.
    exact : bool
        Whether it came back by the undo file, bit for bit; else the update was subtracted.
    keys : sequence of str
        The tensors that were restored.
    doubt : Doubt or None
        Where the update was subtracted: what rounding leaves open.
    """

    merged: str
    output: Path | None
    dry_run: bool
    exact: bool
    keys: Sequence[str]
    doubt: Doubt | None = None

    @property
    def answer(self) -> bool:
        """Whether this can be the base: no entry of the merged model is one that the merge does not write."""
        return self.doubt is None or not self.doubt.none

    def __repr__(self) -> str:
        return f"UnmergeResult({len(self.keys)} tensors, {'bit for bit' if self.exact else 'by subtracting'})"

    @property
    def table(self) -> Table["UnmergeResult"]:
        """All of it as one row."""
        return Table("", COLUMNS if self.doubt is None else (*COLUMNS, *DOUBT_COLUMNS), [self])

    def listing(self) -> list[Table["UnmergeResult"]]:
        """All of it as one row."""
        return [self.table]

    def sentences(self) -> list[str]:
        """What was restored, and how sure that is."""
        written = f"{'would write' if self.dry_run else 'wrote'} {self.output or ''}".rstrip()
        if self.doubt is None:
            return [f"{written}: {len(self.keys)} tensors restored bit for bit, SHA-256 of each checked"]
        return [
            f"{written}: {len(self.keys)} tensors subtracted; of {self.doubt.entries:,} entries "
            f"{self.doubt.several:,} could have been several weights, {self.doubt.none:,} none"
        ]

    def record(self) -> dict[str, Any]:
        """All of it as a JSON object."""
        return self.table.record(self)


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
    **reading: Unpack[Reading],
) -> UnmergeResult:
    """Restore the base that adapters were merged into.

    The undo patch restores every bit of the base, which its SHA-256 proves; the adapters are not needed. With
    ``adapter`` the update is subtracted instead, and the entries that rounding leaves uncertain are counted. Several
    merges are undone in reverse order.

    Parameters
    ----------
    merged : path
        The merged model.
    output : path
        Where the base is written. Not needed where ``dry_run`` is true.
    undo : path, optional
        The undo file of the merge; by default that in ``merged``.
    adapter : path or Adapter, pair, mapping, or sequence of these
        Subtract this instead.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``. The result has the same bits on every device.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Restore and check everything, and write nothing.
    modules : sequence of str
        Subtract only modules whose name or kind matches one of these glob patterns.
    **reading : Reading
        How ``adapter`` is read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        No ``output``; options that exclude each other; an unknown device.
    MismatchError
        The undo file is of another model, or the model was changed since; a merge that cannot be subtracted.
    FormatError
        A file that cannot be read.
    """
    subtracting = isinstance(adapter, str | PathLike) or bool(adapter)
    if undo is not None and subtracting:
        raise OptionError("--undo and --adapter exclude each other", fix="give one of them")
    of_subtracting = [*(["modules"] if modules else []), *stated_options(reading)]
    if of_subtracting and not subtracting:
        raise OptionError(
            f"{option_names(of_subtracting[0])} goes with --adapter: an undo file restores everything",
            fix="leave it out",
        )
    if output is None and not dry_run:
        raise OptionError("the base has to be written somewhere", fix="give -o OUT (output), or --dry-run")
    compute_device = Device.of(device)  # what is wrong with it is said before the work
    target = Path(output) if output is not None else None
    if subtracting:
        # untie=False: subtracting must not split a weight that the merged model shares.
        inputs = read_merge_inputs(weighted_sources([adapter]), merged, reading, modules=modules, untie=False)
        doubt = _subtract(inputs, target, compute_device, overwrite=overwrite, dry_run=dry_run)
        if doubt.none:
            warn("this model was not made by merging this adapter, or was changed since")
        return UnmergeResult(str(merged), target, dry_run, False, list(inputs.plan.tensors), doubt)
    run = UnmergeRun(Path(merged), Path(undo) if undo is not None else None, compute_device)
    if dry_run:
        run.rehearse()
    else:
        assert target is not None
        run.write(target, overwrite=overwrite)
    return UnmergeResult(str(merged), target, dry_run, True, list(run.undo.entries))


def _subtract(inputs: MergeInputs, output: Path | None, device: Device, *, overwrite: bool, dry_run: bool) -> Doubt:
    """Take the update away from every adapted tensor, and count what is doubtful."""
    _check_subtractable(inputs.plan)
    tensors = inputs.plan.tensors
    doubts = {key: Doubt() for key in tensors}
    changes = {key: Change(tensor.source.dtype, tensor.shape) for key, tensor in tensors.items()}

    def subtract(key: str) -> Iterator[Array]:
        return (subtract_block(block, doubts[key]) for block in prepare_merge(tensors[key], device=device).blocks())

    def rehearse(key: str) -> None:
        for rows in subtract(key):
            if step:
                step(rows.nbytes)

    total = copy_bytes({} if dry_run else inputs.files.tensors, changes)
    with progress("subtracting", total) as step:
        if dry_run:
            in_threads(rehearse, list(changes), THREADS)
        else:
            assert output is not None
            write_model(
                inputs.files,
                output,
                changes=changes,
                fill=subtract,
                inputs=inputs.places("the merged model"),
                overwrite=overwrite,
                threads=THREADS,
                step=step,
            )
    return Doubt(*(sum(getattr(doubt, name) for doubt in doubts.values()) for name in ("entries", "several", "none")))


def _check_subtractable(plan: MergePlan) -> None:
    """Refuse a merge that replaced or scaled a weight: subtracting does not give it back."""
    for tensor in plan.tensors.values():
        if tensor.replacement is not None or tensor.tokens or any(slab.magnitude for slab in tensor.slabs):
            raise MismatchError(
                f"{tensor.key} was replaced or scaled (DoRA) by the merge: subtracting does not give it back",
                fix="unmerge with --undo, or take the base from where it came",
            )


COLUMNS: tuple[Column[UnmergeResult], ...] = (
    Column("merged", lambda row: row.merged),
    Column("output", lambda row: None if row.output is None or row.dry_run else str(row.output)),
    Column("exact", lambda row: row.exact),
    Column("tensors", lambda row: len(row.keys)),
)
DOUBT_COLUMNS: tuple[Column[UnmergeResult], ...] = (
    Column("entries", lambda row: row.doubt and row.doubt.entries),
    Column("several", lambda row: row.doubt and row.doubt.several),
    Column("none", lambda row: row.doubt and row.doubt.none),
)
