"""The verb ``convert``: writes an adapter in another dialect, under other names, or in another dtype."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, cpu_count
from typing import Any, Unpack

from loralens.compression.loss import losses, total_error
from loralens.core.adapter import Adapter
from loralens.core.structured import Structured, Update
from loralens.errors import OptionError, place
from loralens.formats import FORMATS, QUANTISED, WriterOptions, encode_adapter
from loralens.formats.dialects import record
from loralens.formats.dialects.experts import fit_experts
from loralens.formats.files.container import Files, Stored
from loralens.tables.numbers import percent
from loralens.tables.result import Tabular
from loralens.verbs.inputs.adapters import AdapterSource, Reading, labels, read_adapter
from loralens.verbs.inputs.choices import (
    FLOAT_TYPES,
    TARGET_FORMATS,
    FloatType,
    TargetFormat,
    check_choice,
    numpy_dtype,
)
from loralens.verbs.outputs.form import PLAIN_BITS, check_known, writer_options
from loralens.verbs.outputs.renaming import named_as_in_base, with_magnitudes, with_prefixes
from loralens.verbs.outputs.rounding import RoundingLoss, quantise_factors, round_factors
from loralens.verbs.outputs.target import Target


@dataclass(frozen=True, slots=True)
class ConvertResult(Tabular):
    """An adapter in another dialect, and what that cost.

    Attributes
    ----------
    source : str
        What the adapter is called: its path, if it was read.
    adapter : Adapter
        As it is read from the file that was written, or would be.
    format : str
        Its dialect.
    modules : int
        That were converted. A dialect may hold several of them as one.
    notes : list of str
        What was renamed, and what was left out.
    truncation : float
        ‖ΔW−ΔW'‖/‖ΔW‖ over all modules: what ``rank`` left out of modules that were no pair.
    rounding : RoundingLoss
        What fewer bits, and scales that were folded into factors, cost.
    rank : int or None
        Of modules that were no pair.
    """

    source: str
    adapter: Adapter
    format: str
    target: Target
    modules: int
    parameters: int
    notes: list[str]
    truncation: float
    rounding: RoundingLoss
    rank: int | None = None

    def __repr__(self) -> str:
        return f"ConvertResult({self.format}, {self.modules} modules)"

    @property
    def bits(self) -> int | None:
        """Of a number in loralens-q; None in other dialects."""
        return PLAIN_BITS if self.format == QUANTISED else None

    def sentences(self) -> list[str]:
        """What was renamed, left out and lost, and what was written."""
        lines = list(self.notes)
        if self.rank:
            what = f"over all modules: what rank {self.rank} leaves out"
            lines.append(f"truncation  ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.truncation)} {what}")
        if self.rounding.worst:
            lines.append(f"{self.rounding}" + (f", {self.bits} bits a number" if self.bits else ""))
        what = f"{self.target.output}: {self.format}" if self.target.output else self.format
        if self.target.written:
            lines.append(f"wrote {what}, {self.modules} modules")
        elif self.target.output or self.target.dry_run:
            lines.append(f"would write {what}, {self.modules} modules")
        return lines

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        return {
            "source": self.source,
            "target": None if self.target.output is None else str(self.target.output),
            "format": self.format,
            "notes": self.notes,
            "modules": self.modules,
            "parameters": self.parameters,
            "truncation": self.truncation,
            "rounding": self.rounding.record(),
            "bits": self.bits,
        }


def convert(
    source: AdapterSource,
    *,
    output: str | PathLike[str] | None = None,
    to: TargetFormat,
    base: str | PathLike[str] | None = None,
    arch: str | None = None,
    dtype: FloatType | None = None,
    prefix: Sequence[str] | Mapping[str, str] = (),
    rank: int | None = None,
    drop_extra: bool = False,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **reading: Unpack[Reading],
) -> ConvertResult:
    """Write an adapter in another dialect, with its names and scales.

    Scales and names that the target dialect cannot state are recorded in its metadata, so loralens reads its own files
    back without ``base`` or ``alpha``. What the dialect cannot hold is folded into the factors where that is exact;
    where it is not, the conversion is refused and the tensor is named. The error of what ``rank`` cuts off, and of
    rounding (``dtype``, loralens-q, a scale that is folded in), is reported. The source is never overwritten.

    Parameters
    ----------
    source : path or Adapter
        It is never written over.
    output : path, optional
        The file or folder to write; without it the result holds what would be written.
    to : str
        The dialect to write.
    base : path, optional
        The base model, of which only the names and shapes of the weights are read.
    arch : str, optional
        The architecture that GGUF states, such as ``llama`` or ``qwen2``; by default from ``base``.
    dtype : str, optional
        Round the factors to ``f32``, ``bf16`` or ``f16``; they stay as they are by default.
    prefix : sequence of str, or mapping of str to str
        ``"OLD=NEW"``, or ``{old: new}``: modules that begin with OLD begin with NEW.
    rank : int, optional
        The rank of modules that are not a pair of factors yet (LoKr, LoHa, full differences).
    drop_extra : bool
        Leave out tensors that the target dialect has no place for.
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Check everything, and write nothing.
    **reading : Reading
        How the file is read: ``format``, ``alpha``, ``scale``, ``allow_pickle``, ``once``.

    Raises
    ------
    OptionError
        A dialect or a dtype that is none; a prefix that no module has; a strength that the target has to state and the
        file does not; rounding that costs too much; a target that exists or is where something is that was read.
    FormatError, MismatchError
        What cannot be read, what the target cannot hold, or modules that the base does not have.
    """
    check_choice("to", to, TARGET_FORMATS)
    check_choice("dtype", dtype, FLOAT_TYPES)
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    (label,) = labels([source])
    adapter = read_adapter(source, reading, base=base, label=label)
    notes: list[str] = []
    with place(label):
        check_known(adapter, to)
        if base is not None:
            adapter, notes = named_as_in_base(adapter, base, to)
        adapter, magnitude_notes = with_magnitudes(with_prefixes(adapter, prefix), base)
        notes += magnitude_notes
        if drop_extra:
            notes.append(f"left out {len(adapter.extra)} tensors that are half of no pair")
            adapter = replace(adapter, extra={})
        pairs, truncation = _as_pairs(adapter, rank)
        narrow = quantise_factors(pairs, PLAIN_BITS) if to == QUANTISED else round_factors(pairs, numpy_dtype(dtype))
    target.check_source(source, base=base)
    with place(label):
        options = writer_options(to, base, arch)
        exact = _rename_as_in(pairs, to, options)
        stored, files, back = _stored_in_dialect(narrow, to, options)
        written = _rename_back(exact, back, stored)
        # loralens-q is a choice for fewer bits: its error is reported, and never refused.
        cost = RoundingLoss.between(exact, written, allow_loss=allow_loss or to == QUANTISED, dtype=dtype)
    target.write(stored, files)
    return ConvertResult(
        label,
        record.apply_stored(back, stored),
        to,
        target,
        len(adapter),
        sum(module.parameters for module in narrow.modules.values()),
        notes,
        truncation,
        cost,
        rank,
    )


def _as_pairs(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """Structured modules as their nearest pairs of a rank, where one was given; and what that cost in all, relative."""
    if rank is None:
        return adapter, 0.0
    if isinstance(rank, bool) or not rank >= 1 or int(rank) != rank:
        raise OptionError(f"rank {rank!r} is not a whole number from 1", fix="give a whole number from 1")
    if not any(isinstance(module, Structured) for module in adapter.modules.values()):
        raise OptionError("--rank is for modules that are no pair yet, and here all are", fix="leave out --rank")

    def pair(module: Update) -> Update:
        return module.truncated(min(int(rank), *module.shape)) if isinstance(module, Structured) else module

    pairs = adapter.map(pair)
    return pairs, total_error(losses(adapter, pairs, threads=cpu_count() or 1))


def _rename_as_in(adapter: Adapter, to: str, options: WriterOptions) -> Adapter:
    """The adapter with its experts cut and called as the target has them: what the written file is compared with."""
    if adapter.format == to:
        return adapter
    return fit_experts(to, adapter, base_config=options.get("base_config"), arch=options.get("arch"))


def _stored_in_dialect(adapter: Adapter, to: str, options: WriterOptions) -> tuple[Stored, Files, Adapter]:
    """What is written, the files it goes to, and what the dialect's reader makes of them."""
    stored, files = encode_adapter(adapter, to, **options)
    return stored, files, next(form for form in FORMATS if form.name == to).read(stored)


def _rename_back(exact: Adapter, back: Adapter, stored: Stored) -> dict[str, Update]:
    """The modules of ``back``, which was read from ``stored``, by the names that ``exact`` has for them."""
    names = {name: file for file, name in stored.names.items()}

    def read(name: str, module: Update) -> Update:
        written = back[names.get(name, name)]  # of a dialect that says no scale: our record does
        return written.rescaled(module.scale, module.scaling) if written.scaling.rule == "unknown" else written

    return {name: read(name, module) for name, module in exact.items()}
