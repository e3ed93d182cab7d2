"""The verb ``convert``: writes an adapter in another dialect, under other names, or in another dtype."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any, Unpack, cast, overload

from loralens.choices import TARGET_FORMATS, FloatType, TargetFormat
from loralens.compression.loss import losses, total_error
from loralens.core.adapter import Adapter
from loralens.core.structured import Structured, Update
from loralens.core.threads import processor_count
from loralens.errors import OptionError, place
from loralens.formats.dialects import record
from loralens.formats.dialects.fitting import OF_IMAGE_MODELS, fit_to_dialect
from loralens.formats.dialects.table import FORMATS
from loralens.formats.files.container import Stored
from loralens.tables.numbers import count, percent
from loralens.tables.table import Table
from loralens.verbs.batches.batch import AdapterWork, in_batches, one_adapter
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.inputs.adapters import AdapterSource, Reading, Source, labels, read_adapter
from loralens.verbs.inputs.choices import numpy_dtype
from loralens.verbs.outputs.form import OutputFormat, check_known, writer_options
from loralens.verbs.outputs.module_columns import COLUMNS, NamedModule
from loralens.verbs.outputs.renaming import (
    add_magnitudes,
    rename_as_in_base,
    replace_prefixes,
    warn_of_components,
    with_known_names,
)
from loralens.verbs.outputs.rounding import RoundingCost, round_factors
from loralens.verbs.outputs.target import Target, Written
from loralens.verbs.outputs.writing import check_writing


@dataclass(frozen=True, slots=True)
class ConvertResult(Written):
    """An adapter in another dialect, and the errors of the conversion.

    Attributes
    ----------
    source : str
        The path of the adapter, or the name of an object in messages.
    adapter : Adapter
        The adapter as it is read from the new file, or would be read.
    format : str
        The new dialect.
    modules : int
        The number of modules that were converted. A dialect may store several of them as one.
    notes : list of str
        Remarks for the user: what was renamed, and what was left out.
    truncation : float
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F over all modules; the part that ``rank`` left out of modules that were not pairs.
    rounding : RoundingCost
        The error of fewer bits, and of scales that were folded into factors.
    rank : int or None
        The rank that was asked for, for modules that were not pairs.
    format_before : str
        The dialect of the source.
    """

    source: str
    adapter: Adapter
    format: str
    target: Target
    modules: int
    parameters: int
    notes: list[str]
    truncation: float
    rounding: RoundingCost
    rank: int | None = None
    format_before: str = ""

    def __repr__(self) -> str:
        return f"ConvertResult({self.format}, {self.modules} modules)"

    def numbers(self) -> dict[str, Any]:
        """What matters of this adapter among several, as JSON values."""
        return {
            "modules": self.modules,
            "format_before": self.format_before,
            "format": self.format,
            "truncation": self.truncation,
            "rounding": self.rounding.total,
        }

    def listing(self) -> list[Table[NamedModule]]:
        """The modules as the new file has them."""
        return [Table(f"{self.source} as {self.format}", COLUMNS, list(self.adapter.items()))]

    def conclusion(self) -> list[str]:
        """The new dialect, and how much of the update is lost on the way."""
        losses = {f"by rank {self.rank}": self.truncation, "by rounding": self.rounding.total}
        lost = [f"{percent(loss)} of the update lost {reason}" for reason, loss in losses.items() if loss]
        loss = " and ".join(lost) or "without loss"
        what = f"{self.source} as {self.format}, {count(self.modules, 'module')}, {loss}"
        return [self.target.conclusion(what)]

    def sentences(self) -> list[str]:
        """The notes, and the errors."""
        lines = list(self.notes)
        if self.rank:
            what = f"over all modules: what rank {self.rank} leaves out"
            lines.append(f"truncation  ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.truncation)} {what}")
        if self.rounding.worst:
            lines.append(str(self.rounding))
        return lines

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "source": self.source,
            # A dry run states it too, as docs/json.md says.
            "target": None if self.target.output is None else str(self.target.output),
            "format": self.format,
            "notes": self.notes,
            "modules": self.modules,
            "parameters": self.parameters,
            "truncation": self.truncation,
            "rounding": self.rounding.record(),
        }


CHANGES = ("to", "dtype", "prefix", "rank", "drop_extra")  # the options that say what changes


class ConvertOptions(Reading, total=False):
    """The options of `convert`, for its two signatures."""

    output: str | PathLike[str] | None
    to: TargetFormat | None
    base: str | PathLike[str] | None
    arch: str | None
    dtype: FloatType | None
    prefix: Sequence[str] | Mapping[str, str]
    rank: int | None
    drop_extra: bool
    allow_loss: bool
    overwrite: bool
    dry_run: bool
    jobs: int | None


def _check_change(options: Mapping[str, Any]) -> None:
    """Refuse an unknown dialect or dtype, and options that ask for no change, before anything is read."""
    check_writing(options.get("to"), options.get("dtype"))
    # `rank` 0 is refused with a message of its own.
    if not any(options.get(name) not in (None, False, (), [], {}) for name in CHANGES):
        fix = f"give --to ({', '.join(TARGET_FORMATS)}), or --dtype bf16"
        raise OptionError("nothing says what to convert to", fix=fix)


# As of `compress`: the first signature wins, and a path may name a folder with several adapters.
@overload
def convert(  # type: ignore[overload-overlap]
    source: AdapterSource, **options: Unpack[ConvertOptions]
) -> ConvertResult | Any: ...
@overload
def convert(source: Sequence[AdapterSource], **options: Unpack[ConvertOptions]) -> BatchResult: ...
@in_batches(lambda verb: AdapterWork(verb, ConvertResult.numbers, check=_check_change))
def convert(
    source: Source,
    *,
    output: str | PathLike[str] | None = None,
    to: TargetFormat | None = None,
    base: str | PathLike[str] | None = None,
    arch: str | None = None,
    dtype: FloatType | None = None,
    prefix: Sequence[str] | Mapping[str, str] = (),
    rank: int | None = None,
    drop_extra: bool = False,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    jobs: int | None = None,
    **reading: Unpack[Reading],
) -> ConvertResult | BatchResult:
    """Write an adapter in another dialect, with its names and scales.

    Scales and names that the target dialect cannot state are recorded in its metadata, so loralens reads its own files
    back without ``base`` or ``alpha``. What the dialect cannot hold is folded into the factors where that is exact;
    where it is not, the conversion is refused and the tensor is named. The error of what ``rank`` cuts off, and of
    rounding (``dtype``, a scale that is folded in), is reported. The source is never overwritten.

    Parameters
    ----------
    source : path or Adapter, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each.
    output : path, optional
        The file or folder to write. Without it nothing is written, and the result holds the converted adapter. For
        several adapters it is a folder, in which each has its own name.
    to : str, optional
        The dialect to write. Only if ``dtype``, ``prefix``, ``rank`` or ``drop_extra`` says what changes, it is by
        default the dialect of each adapter.
    base : path, optional
        The base model. Its configuration and the names and shapes of its weights are read. Its numbers are read only
        for magnitudes that the adapter's file lacks, and for tensors of the adapter that may be copies of the base's.
    arch : str, optional
        The architecture that GGUF states, such as ``llama`` or ``qwen2``; by default that of ``base``.
    dtype : str, optional
        Round the factors to ``f32``, ``bf16`` or ``f16``. By default they stay as they are.
    prefix : sequence of str, or mapping of str to str
        ``"OLD=NEW"``, or ``{old: new}``: modules whose name begins with OLD get a name that begins with NEW.
    rank : int, optional
        Make pairs of factors of this rank from modules that are not pairs (LoKr, LoHa, full differences).
    drop_extra : bool
        Leave out tensors that the target dialect has no place for.
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Check everything, and write nothing.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process; 1 by default.
    **reading : Reading
        How the file is read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        Nothing says what changes, the dialect or the dtype is unknown, no module has the prefix, the target dialect has
        to state a scale that the file does not give, rounding costs too much, or the target exists or overlaps with an
        input.
    FormatError, MismatchError
        The file cannot be read, the target dialect cannot hold something of it, or the base lacks a module.
    """
    del jobs  # one adapter is one job
    source = one_adapter(source)
    _check_change({"to": to, "dtype": dtype, "prefix": prefix, "rank": rank, "drop_extra": drop_extra})
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    (label,) = labels([source])
    adapter = read_adapter(source, reading, base=base, label=label)
    format_before = adapter.format
    with place(label):
        to = _dialect(adapter, to)
        adapter, notes = with_known_names(adapter, to)
        if base is not None:
            adapter, base_notes = rename_as_in_base(adapter, base, to)
            notes += base_notes
        # Prefixes last, so that OLD may begin a name of the base.
        adapter, magnitude_notes = add_magnitudes(replace_prefixes(adapter, prefix), base)
        notes += magnitude_notes
        # This comes after the magnitudes: those that were just added are left out too if the user wants no extras.
        if drop_extra:
            notes.append(f"left out {len(adapter.extra)} tensors that do not belong to a pair")
            adapter = replace(adapter, extra={})
        pairs, truncation = _as_pairs(adapter, rank)
        narrow = round_factors(pairs, numpy_dtype(dtype))
    target.check_source(source, base=base)
    with place(label):
        form = OutputFormat(to, writer_options(to, base, arch), base)
        stored, files = form.encode(narrow)
        # The stored form is read back in memory: the result is what a reader will see, whether it is written or not.
        back = next(each for each in FORMATS if each.name == to).read(stored)
        if to != format_before:
            warn_of_components(back, format_before)
        exact = pairs
        # Another dialect may divide, join and rename modules, and the error is measured under its names.
        if pairs.format != to:
            options = form.options
            exact = fit_to_dialect(to, pairs, base_config=options.get("base_config"), arch=options.get("arch"))
            notes += _note_architecture(to, pairs, exact)
        written = _rename_back(exact, back, stored)
        cost = RoundingCost.between(exact, written, allow_loss=allow_loss, dtype=dtype)
    target.write(stored, files)
    measured = len(adapter), sum(module.parameters for module in narrow.modules.values()), notes, truncation, cost
    # An adapter may have so many modules that one more copy of their objects takes the most memory.
    del adapter, pairs, narrow, exact, written
    # The record in the metadata holds names and scales that the dialect itself cannot state.
    converted = record.apply_stored(back, stored)
    return ConvertResult(label, converted, to, target, *measured, rank, format_before)


def _dialect(adapter: Adapter, to: str | None) -> TargetFormat:
    """The dialect to write: ``to``, or else the adapter's own.

    If ``to`` is given, the file must not leave open what this dialect needs (`check_known`).
    """
    if to is not None:
        check_known(adapter, to)
    elif adapter.format not in TARGET_FORMATS:
        raise OptionError(f"{adapter.format} is only read, not written", fix=f"give --to: {', '.join(TARGET_FORMATS)}")
    return cast("TargetFormat", to or adapter.format)


def _note_architecture(to: str, before: Adapter, after: Adapter) -> list[str]:
    """What was done to the layers of an image model, for the user."""
    if to not in OF_IMAGE_MODELS or (before.modules.keys() == after.modules.keys() and to != "kohya"):
        return []
    from loralens.formats.dialects.image import model_of

    model = model_of(before)
    if model is None:
        return []
    change = f"; {count(len(before), 'module')} became {len(after)}" if len(before) != len(after) else ""
    return [f"{model.name}, by the names and shapes of the modules: named as {to} has them{change}"]


def _as_pairs(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """Replace modules that are not pairs by their nearest pairs of ``rank``, and measure the relative error of all.

    Without a rank the modules stay as they are. A dialect that can only store pairs then refuses them by name.
    """
    if rank is None:
        return adapter, 0.0
    # True is an int for Python, but rank=True is a mistake.
    if isinstance(rank, bool) or not rank >= 1 or int(rank) != rank:
        raise OptionError(f"rank {rank!r} is not a whole number from 1", fix="give a whole number from 1")
    if not any(isinstance(module, Structured) for module in adapter.modules.values()):
        raise OptionError("--rank is for modules that are not pairs yet, and here all are", fix="leave out --rank")

    def pair(module: Update) -> Update:
        # A matrix has at most min(out, in) directions.
        return module.truncated(min(int(rank), *module.shape)) if isinstance(module, Structured) else module

    # Measured over all modules, so that the number is comparable with that of compress.
    pairs = adapter.map(pair)
    return pairs, total_error(losses(adapter, pairs, threads=processor_count()))


def _rename_back(exact: Adapter, back: Adapter, stored: Stored) -> dict[str, Update]:
    """The modules of ``back``, which was read from ``stored``, under the names that they have in ``exact``."""
    names = {name: file for file, name in stored.names.items()}

    def find(name: str, module: Update) -> Update:
        written = back[names.get(name, name)]
        # A dialect that states no scale leaves it to the record in the metadata, which is not applied here.
        return written.rescaled(module.scale, module.scaling) if written.scaling.formula == "unknown" else written

    return {name: find(name, module) for name, module in exact.items()}
