"""The verb ``merge``: merges adapters into a base model, with a certificate of what arrived and an undo patch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from loralens.core.messages import note, warn
from loralens.errors import OptionError
from loralens.formats.records.merged import CERTIFICATE
from loralens.formats.records.undo import NAME
from loralens.linalg.device import Device
from loralens.merging.plan import MergePlan
from loralens.merging.rounding import Mode
from loralens.merging.summary import MODULE_COLUMNS, MergedModule
from loralens.tables.numbers import number
from loralens.tables.result import Tabular
from loralens.tables.table import Table
from loralens.verbs.inputs.adapters import Reading
from loralens.verbs.inputs.choices import FLOAT_TYPES, check_choice
from loralens.verbs.inputs.merge_inputs import MergeInputs, read_merge_inputs
from loralens.verbs.inputs.weighted import Weighted, weighted_sources
from loralens.verbs.outputs.merge_run import MergeRun

ModelDtype = Literal["keep", "f32", "bf16", "f16"]

# A word, since leaving the option out means the default place.
NONE = "none"  # in place of a file: it is not written
SWALLOWED = 0.95  # gain below which a merge is said to lose too much
DAMAGED = 0.2  # and relative error above which
NAMED = 3  # modules that are named in a message


@dataclass(frozen=True, slots=True, repr=False)
class MergeResult(Tabular):
    """What was merged into what, and how much of it arrived.

    Attributes
    ----------
    output : Path or None
        Where the merged model is, or would be.
    dry_run : bool
        Whether nothing was written.
    measured : bool
        Whether it was measured what arrives.
    plan : Plan
        Which tensors of the base change, and how.
    modules : sequence of MergedModule
        What arrived of every update; empty where it was not measured.
    certificate : mapping
        The certificate as a JSON object.
    """

    output: Path | None
    dry_run: bool
    measured: bool
    plan: MergePlan
    modules: Sequence[MergedModule]
    certificate: Mapping[str, Any]

    def __repr__(self) -> str:
        total = self.certificate["total"]
        gain = f", gain {total['gain']:.4f}" if self.modules else ""
        return f"MergeResult({total['tensors']} tensors, {len(self.modules)} updates{gain})"

    @property
    def table(self) -> Table[MergedModule]:
        """The adapted modules, one a row."""
        return Table(self._title, MODULE_COLUMNS, self.modules)

    @property
    def _title(self) -> str:
        total = self.certificate["total"]
        verb = "would write" if self.dry_run else "wrote"
        title = f"{verb} {self.output or ''}".rstrip() + f": {total['tensors']} tensors changed"
        if not self.measured:
            return title + "; nothing was measured without a certificate"
        if not self.modules:
            return title
        return title + (
            f", {len(self.modules)} updates, gain {total['gain']:.4f}, error {number(total['relative_error'])}"
        )

    def tables(self) -> list[Table[MergedModule]]:
        """The adapted modules."""
        return [self.table]

    def sentences(self) -> list[str]:
        """What was written, where no table says it; and what the undo patch takes."""
        if not self.modules:
            return [self._title]
        total = self.certificate["total"]
        if total["undo_bytes"] is None:
            return []
        bits = total["undo_bits_per_weight"]
        return [f"undo patch: {total['undo_bytes']:,} bytes, {bits:.2f} bits for each changed weight"]

    def record(self) -> dict[str, Any]:
        """The certificate."""
        return dict(self.certificate)


def merge(
    *adapters: Weighted,
    base: str | PathLike[str],
    output: str | PathLike[str] | None = None,
    undo: str | PathLike[str] | None = None,
    certificate: str | PathLike[str] | None = None,
    measure: bool = False,
    rounding: Mode = "nearest",
    seed: int = 0,
    dtype: ModelDtype = "keep",
    allow_missing: bool = False,
    untie: bool | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    modules: Sequence[str] = (),
    **reading: Unpack[Reading],
) -> MergeResult:
    """Merge adapters into a base model, W' = W + Σ w·ΔW, shard by shard and rounded once.

    Every other tensor is copied byte for byte, and so are the files beside the weights.

    Parameters
    ----------
    *adapters : path or Adapter, pair, or mapping
        ``"a"``, ``("a", 0.7)`` or ``{"a": 0.7, "b": 0.3}``: adapters, and how many times each counts.
    base : path
        The base model: a folder, a safetensors file, or a Hub id in the local cache.
    output : path
        Folder to write; a file where the base is one file. Not needed where ``dry_run`` is true.
    undo : path, optional
        Where the undo patch goes, from which `loralens.unmerge` restores the base bit for bit: by default in
        ``output``. ``"none"``: it is not made.
    certificate : path, optional
        Where the certificate of how much of every update arrived goes; as ``undo``.
    measure : bool
        Measure how much of every update arrived, even if no certificate is written.
    rounding : str
        How a merge rounds the new weights to their dtype: ``nearest``, ``stochastic`` or ``feedback``.
    seed : int
        Seed of the random numbers for stochastic rounding.
    dtype : str
        The dtype of the merged model: ``f32``, ``bf16``, ``f16``, or ``keep`` for every tensor's own.
    allow_missing : bool
        Leave out modules that have no weight in the base.
    untie : bool, optional
        Whether a head that shares the embedding's weight gets a weight of its own; by default if the adapter needs one.
    device : str
        The device for computations on W: ``cpu``, ``cuda`` or ``cuda:N``. The result has the same bits on every device.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Measure what would arrive, and write nothing.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    **reading : Reading
        How files are read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        No ``output``; an unknown rounding, dtype or device; an ``output`` where something would be lost.
    FormatError
        A file that cannot be read; a quantised base.
    MismatchError
        Adapters and base do not fit together.
    """
    check_choice("rounding", rounding, get_args(Mode))
    check_choice("dtype", dtype, get_args(ModelDtype))
    if output is None and not dry_run:
        raise OptionError("a merged model has to be written somewhere", fix="give -o OUT (output), or --dry-run")
    compute_device = Device.of(device)  # what is wrong with it is said before the work
    inputs = read_merge_inputs(
        weighted_sources(adapters),
        base,
        reading,
        modules=modules,
        allow_missing=allow_missing,
        untie=untie,
        dtype=FLOAT_TYPES.get(dtype),
    )
    _tell_plan(inputs.plan)
    target = Path(output) if output is not None else None
    undo_file, certificate_file = (
        _path_beside(target, path, name, folder=inputs.files.root.is_dir())
        for path, name in ((undo, NAME), (certificate, CERTIFICATE))
    )
    # A dry run has no other purpose than to measure.
    measured = dry_run or measure or certificate_file is not None
    run = MergeRun(
        inputs,
        rounding=rounding,
        seed=seed,
        fidelity=measured,
        undo=undo_file is not None and not dry_run,
        device=compute_device,
    )
    if dry_run:
        run.rehearse()
    else:
        assert target is not None
        run.write(target, undo=undo_file, certificate=certificate_file, overwrite=overwrite)
    result = MergeResult(target, dry_run, measured, inputs.plan, run.modules(), run.certificate())
    _warn_of_losses(result.modules, inputs, rounding)
    return result


def _path_beside(output: Path | None, path: str | PathLike[str] | None, name: str, *, folder: bool) -> Path | None:
    """Where the undo file or the certificate goes; None where it is not written."""
    if path is not None:
        return None if str(path) == NONE else Path(path)
    if output is None:
        return None
    return output / name if folder else output.with_name(f"{output.stem}.{name}")


def _tell_plan(plan: MergePlan) -> None:
    """Edits of names, what else is to be known, and what is left out."""
    for text in (*(str(match) for match in plan.matches if match.edit), *plan.notes):
        note(text)
    if plan.missing:
        names = ", ".join(plan.missing[:NAMED]) + (", …" if len(plan.missing) > NAMED else "")
        note(f"left out, as the base has no place for them: {names}")


def _warn_of_losses(modules: Sequence[MergedModule], inputs: MergeInputs, rounding: Mode) -> None:
    """Warn where rounding swallows an update or a weight overflows, and say what to do."""
    dtype = inputs.narrowest
    arrived = [module.fidelity for module in modules]
    overflowed = sum(fidelity.overflowed for fidelity in arrived)
    if overflowed:
        narrow = dtype not in ("float32", "bfloat16")
        fix = "write --dtype f32 (or bf16)" if narrow else "check the adapter's α and scale with loralens doctor"
        warn(f"{overflowed:,} weights became infinite: {dtype} does not reach so far", fix)
    damaged = [fidelity for fidelity in arrived if fidelity.gain < SWALLOWED or fidelity.error > DAMAGED]
    # In float32 there is no wider dtype to recommend.
    if not damaged or dtype == "float32":
        return
    worst = max(damaged, key=lambda fidelity: fidelity.error)
    ways = ["write --dtype f32" + (" (or f16, where the model runs in it)" if dtype == "bfloat16" else "")]
    ways.append("serve the adapter unmerged")
    if rounding == "nearest" and any(fidelity.gain < SWALLOWED for fidelity in damaged):
        ways.append("take --rounding stochastic: full strength at the price of noise")
    warn(
        f"rounding to {dtype} damages {len(damaged)} of {len(arrived)} updates; worst is {worst.module}: "
        f"gain {worst.gain:.2f}, error {worst.error:.2f}",
        f"{', '.join(ways[:-1])}, or {ways[-1]}",
    )
