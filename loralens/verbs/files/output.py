"""The place where a verb writes, with checks that refuse a wrong one before any work, and the sentence about it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast, final

import numpy as np

from loralens.analysis.diagnosis import Examination, Saving
from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, FloatType, TargetFormat
from loralens.compression.directions import DType, cast_factors, locate_errors
from loralens.compression.loss import UpdateLoss, total_error, update_loss
from loralens.compression.truncation_plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.messages import note, warn
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.names import some
from loralens.core.ranks import Rule
from loralens.core.structured import Update, product_dtype
from loralens.core.threads import in_threads, processor_count
from loralens.errors import LoraLensError, OptionError, place
from loralens.exports import Options
from loralens.formats import encode_adapter, load, save, stored_size
from loralens.formats.dialects.dialect_table import FORMATS, GGUF
from loralens.formats.files.adapter_files import write_files
from loralens.formats.files.atomic import check_apart
from loralens.formats.files.container import Files, Stored
from loralens.formats.files.location import SUFFIXES, find_adapter
from loralens.formats.models.model_files import resolve_path
from loralens.tables.numbers import percent
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Keys, Recorded
from loralens.verbs.shared.adapters import AdapterSource
from loralens.verbs.shared.options import check_choice

SAME_SIZE = 5e-4  # of a file; a smaller saving, such as of a few bytes of the header, is none
Inputs = Mapping[str, ModelPath | None]  # what an input is called ("the base") → where it is


@dataclass(frozen=True, slots=True, kw_only=True)
class Target(Options):
    """Writing: the place, and what happens to what is there.

    Parameters
    ----------
    output : path, optional
        The file or folder to write.

        A file has the suffix of its dialect. Without ``output`` nothing is written; the result is in memory.
    overwrite : bool
        Replace what is already at the output path.
    dry_run : bool
        Check everything and report what would be done, but write nothing.
    """

    output: Path | None = None
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        # A verb may be given the path as text.
        if self.output is not None:
            object.__setattr__(self, "output", Path(self.output))

    @property
    def written(self) -> Path | None:
        """The place that is written to; None in a dry run and without an output."""
        return None if self.dry_run else self.output

    @property
    def is_wanted(self) -> bool:
        """Whether the caller asked for a file, if only in a dry run. Python may ask for the resulting object alone."""
        return self.output is not None or self.dry_run

    def conclusion(self, what: str) -> str:
        """``Wrote OUT: what.``, or ``Would write OUT: what.`` in a dry run; ``what.`` alone if no file is wanted."""
        if not self.is_wanted:
            return f"{what}."
        return f"{'Wrote' if self.written else 'Would write'} {self.output or ''}".rstrip() + f": {what}."

    def check_source(
        self, source: AdapterSource, *, base: ModelPath | None = None, other_inputs: Inputs | None = None
    ) -> None:
        """Refuse a target that overlaps with the source, the base or another input.

        The target may be none of them, contain none and lie in none. A file beside the source is allowed, unless both
        would share one configuration file. A source that is an `Adapter` has no place, so only the others are checked.

        Raises
        ------
        OptionError
            The message names the input and how it overlaps with the target.
        """
        output = self.output
        # An object may have come from a file, but from which one is not known here.
        if output is not None and not isinstance(source, Adapter):
            found = find_adapter(source)
            file, config = found.file, found.config
            # Refused even with --overwrite, since the result lacks what was cut or rounded. samefile() follows links.
            if output.exists() and (output.samefile(file) or output.samefile(file.parent)):
                raise OptionError(
                    f"{output} is where the source is", fix="choose another target: a source is never written over"
                )
            # Readers take α and r from adapter_config.json beside the weights. With two files of weights in one folder
            # the configuration can belong to only one of them. A GGUF file holds its configuration itself.
            shares = output.suffix in SUFFIXES and output.suffix != ".gguf"
            if config and shares and output.parent.is_dir() and output.parent.samefile(file.parent):
                raise OptionError(
                    f"{output} would share {config.name} with the source, and one of them would be read wrongly",
                    fix="choose another folder",
                )
            # A single file replaces nothing in the source's folder, so it may lie there; a folder has to lie outside.
            check_apart(output, found.inputs, within=output.suffix not in SUFFIXES)
        self.check_inputs({"the base": base, **(other_inputs or {})})

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse a target that is one of the inputs, contains one or lies in one."""
        if self.output is None:
            return
        # A Hub id is a path in the cache once it is resolved. The text itself is checked as well, because a folder of
        # that name may exist.
        places = [
            (what, place)
            for what, path in inputs.items()
            if path and not isinstance(path, ModelInMemory)
            for place in (Path(path), resolve_path(Path(path)))
        ]
        check_apart(self.output, places)

    def check_format(self, name: str) -> None:
        """Refuse a target to which a file of the dialect ``name`` cannot be written."""
        if self.output is None:
            return
        # A dry run with no tensors makes every check of the real writing, and needs no adapter yet.
        files = next(form.files for form in FORMATS if form.name == name)
        assert files
        write_files(Stored({}), self.output, files=files, overwrite=self.overwrite, dry_run=True)

    def write(self, stored: Stored, files: Files) -> None:
        """Write an adapter in its stored form; a dry run makes the same checks and raises the same errors."""
        if self.output is not None:
            write_files(stored, self.output, files=files, overwrite=self.overwrite, dry_run=self.dry_run)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTarget(Target):
    """Writing: where the adapter is written, and in which form.

    Parameters
    ----------
    to : str, optional
        The dialect to write. [default: the dialect of the source, or the nearest that can be written]
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. DoRA and GGUF need it.
    dtype : str, optional
        Round all factors to this dtype. [default: the dtypes of the source]
    """

    to: TargetFormat | None = None
    base: ModelPath | None = None
    dtype: FloatType | None = None

    def check(self) -> None:
        """Refuse an unknown dialect or dtype before anything is read."""
        check_choice("to", self.to, TARGET_FORMATS)
        check_choice("dtype", self.dtype, FLOAT_TYPES)

    def form(self, adapter: Adapter) -> "OutputFormat":
        """The form in which an adapter is written: in its own dialect unless another is asked for.

        The nearest dialect takes the place of one that is only read, and a note says so if a file is wanted.

        Raises
        ------
        OptionError
            The dialect has to state a scale that the adapter's file does not give.
        """
        self.check()
        name: str = self.to or next(form.nearest or form.name for form in FORMATS if form.name == adapter.format)
        # Within one dialect and in memory, what the file leaves open may stay open.
        if name != adapter.format and (self.to or self.is_wanted):
            check_known(adapter, name)
            if not self.to:
                note(f"{adapter.format} files are only read: written as {name}; --to chooses another dialect")
            # As in files of cloneofsimo.
            if adapter.format == "safeloras":
                warn(
                    f"the modules have numbers for names, so no program will find their layers in the {name} file",
                    "load the original file with the program lora of cloneofsimo, or merge it there",
                )
        return OutputFormat.with_base(name, self.base)


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing(AdapterTarget):
    """Writing: where the adapter is written, and in which form; the error of rounding it is limited.

    Parameters
    ----------
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    """

    allow_loss: bool = False


class Written(Tabular):
    """A result of which something was written, or would be."""

    __slots__ = ()

    target: Target

    def __post_init__(self) -> None:
        # What was written is named by its file, and what was not by the verb and its input.
        adapter = getattr(self, "adapter", None)
        # Some results compute theirs from another field.
        if isinstance(adapter, Adapter) and not isinstance(getattr(type(self), "adapter", None), property):
            verb = type(self).__name__.removesuffix("Result").lower()
            origin = adapter.source.removeprefix("in memory: ")
            source = str(self.output or f"in memory: {verb} of {origin}".removesuffix(" of "))
            object.__setattr__(self, "adapter", replace(adapter, source=source))

    @property
    def output(self) -> Path | None:
        """The place that was written to; None in a dry run and without an output."""
        return self.target.written


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """A dialect, and the options of its writer.

    Attributes
    ----------
    arch, base_config
        What the writers of GGUF and mlx are told about the base model.
    base : path or None
        The base model, which is needed to read GGUF back.
    """

    name: str
    base: ModelPath | None = None
    arch: str | None = None
    base_config: Mapping[str, Any] | None = None

    @classmethod
    def with_base(cls, name: str, base: ModelPath | None, arch: str | None = None) -> Self:
        """A dialect and the options that its writer takes from the base model.

        The configuration of the base gives GGUF the architecture and the numbers of heads, and mlx the experts' names.
        """
        # The other writers take everything from the adapter.
        if base is None or name not in (GGUF, "mlx"):
            return cls(name, base, arch if name == GGUF else None)
        from loralens.formats.models.checkpoint import model_config  # most adapters are written without a base

        return cls(name, base, arch if name == GGUF else None, model_config(base))

    @property
    def one_rank(self) -> bool:
        """Whether all modules of a file have the same rank."""
        # mlx-lm reads one ``rank`` for all layers from adapter_config.json.
        return self.name == "mlx"

    def check_target(self, target: Target, source: AdapterSource, *, other_inputs: Inputs | None = None) -> None:
        """Refuse, before any work, a target that overlaps with an input or that the dialect cannot be written to."""
        target.check_source(source, base=self.base, other_inputs=other_inputs)
        target.check_format(self.name)

    def encode(self, adapter: Adapter) -> tuple[Stored, Files]:
        """The tensors and header of the file, and the names of the files that belong to the dialect."""
        return encode_adapter(adapter, self.name, arch=self.arch, base_config=self.base_config)

    def size(self, adapter: Adapter) -> int:
        """The size of the file of weights in bytes, from its header alone."""
        return stored_size(*self.encode(adapter))

    def write(self, adapter: Adapter, target: Target) -> tuple[Adapter, int]:
        """Write an adapter, and return the adapter that is read back and the size of its file of weights in bytes.

        If nothing is to be written, the adapter itself is returned: factors are read back as they are.
        """
        output = target.written
        if output is None:
            return adapter, self.size(adapter)
        save(
            adapter, output, format=self.name, overwrite=target.overwrite, arch=self.arch, base_config=self.base_config
        )
        # strict=False, since an adapter that was loaded so would be refused here, after it was written.
        found = find_adapter(output)
        return load(found, format=self.name, base=self.base, strict=False), found.file.stat().st_size


def check_known(adapter: Adapter, to: str) -> None:
    """Refuse to write an adapter in the dialect ``to`` if its file leaves the scale or the order of rows open.

    Raises
    ------
    OptionError
        The message says which option gives what is missing.
    """
    # GGUF itself stores q and k in this order, so there it need not be undone.
    if to != GGUF and any(finding.code == "rows-permuted" for finding in adapter.findings):
        raise OptionError(
            "the rows of q and k are in llama.cpp's order, and the file does not state the numbers of heads",
            fix="give --base DIR",
        )
    unknown = any(finding.code == "alpha-unknown" for finding in adapter.findings)
    # A loralib checkpoint stores no α at all: the training code has it.
    if unknown and to != "loralib":
        raise OptionError(
            f"the file does not state its α, which {to} needs", fix="give the --alpha or --scale of the training code"
        )


def source_bytes(source: AdapterSource, adapter: Adapter, form: OutputFormat) -> int:
    """The size in bytes of the file that was read. For an object, it is the size of a file of its own dialect."""
    if not isinstance(source, Adapter):
        return find_adapter(source).file.stat().st_size
    # A dialect without a writer has no size that could be computed, so that of the result stands in for it.
    if adapter.format not in TARGET_FORMATS:
        return form.size(adapter)
    return OutputFormat.with_base(adapter.format, form.base).size(adapter)


def file_saving(sources: Mapping[str, AdapterSource], base: ModelPath | None) -> Saving:
    """The function from an examined adapter to what `compress` to a share of the energy would save of its file.

    ``sources`` has every adapter by its label. The sizes are those of `OutputFormat.size`, as in `compress` itself.
    """

    def saving(exam: Examination, energy: float) -> float | None:
        # The command makes all modules smaller, and only those that were chosen are known.
        if len(exam.spectra) < len(exam.adapter):
            return None
        try:
            form = AdapterTarget(to=cast("TargetFormat", exam.to or None), base=base).form(exam.adapter)
            plan = TruncationPlan.of_values(exam.adapter, {name: one.s for name, one in exam.spectra.items()})
            ranks = plan.ranks(Rule("energy", energy), one_rank=exam.needs_one_rank)
            before = source_bytes(sources[exam.path], exam.adapter, form)
            saved = 1 - form.size(plan.at(ranks)) / before
        except LoraLensError:  # an adapter that its dialect cannot hold, such as GGUF's without a base
            return None
        return saved if saved >= SAME_SIZE else 0.0

    return saving


# The largest relative error of one module that is written without --allow-loss. Rounding both factors to bfloat16 costs
# about 0.002 and to float16 about 0.0003, so only numbers below the range of float16 (6e-8) or a scale that is folded
# into a narrow factor exceed it: an update with entries of 3e-8 loses half of itself in float16.
LIMIT = 0.01


@final
@dataclass(frozen=True, slots=True)
class RoundingCost(Recorded):
    """The error that rounding the factors adds to an adapter.

    Attributes
    ----------
    total : float
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F over all modules.
    worst : float
        The largest relative error of a single module.
    module : str
        The module with that error; empty if nothing is lost.
    """

    total: float = 0.0
    worst: float = 0.0
    module: str = ""

    @classmethod
    def between(
        cls, before: Adapter, after: Mapping[str, Update], *, allow_loss: bool, dtype: str | None = None
    ) -> "RoundingCost":
        """Measure the error of every module of ``before`` in ``after``, which has the same names.

        Parameters
        ----------
        before : Adapter
        after : mapping of str to Update
            The modules as they are read back, so that a scale which the dialect folds into the factors counts too.
        allow_loss : bool
            Return an error above `LIMIT` instead of refusing it.
        dtype : str, optional
            The dtype that was asked for, for the message.

        Raises
        ------
        OptionError
            The relative error of a module is above `LIMIT`.
        """

        def loss(name: str) -> UpdateLoss:
            with place(name):
                return update_loss(before[name], after[name])

        # Dtypes and scales often show that no bit changed, and then no factor has to be read.
        if all(_is_surely_equal(module, after[name]) for name, module in before.items()):
            return cls()
        # Factors with NaN or Inf have no norm, and are carried over as they are.
        numbers = [
            name
            for name, module in before.items()
            if not isinstance(module, LowRank) or all(np.isfinite(factor).all() for factor in (module.B, module.A))
        ]
        if broken := [name for name in before if name not in set(numbers)]:
            many = (
                f"{some(broken)} hold NaN or Inf, and are"
                if len(broken) > 1
                else f"{broken[0]} holds NaN or Inf, and is"
            )
            consequence = "the error is that of the other modules" if numbers else "nothing could be measured"
            warn(f"{many} written so; {consequence}", fix="the adapter is damaged or diverged: use an earlier one")
        # All of them, since modules without a loss count in the norm of the whole.
        losses = in_threads(loss, numbers, processor_count())
        module = max(losses, key=lambda name: losses[name].relative_error, default="")
        if not module or not losses[module].relative_error:
            return cls()
        cost = cls(total_error(losses), losses[module].relative_error, module)
        if cost.worst > LIMIT and not allow_loss:
            raise OptionError(
                f"{module}: rounding{f' to {dtype}' if dtype else ''} costs {percent(cost.worst)} of ΔW "
                f"({percent(cost.total)} of all modules)",
                # bfloat16 has the range of float32, so it helps where the numbers are too small for float16.
                fix=f"give --dtype {'bf16 or ' if dtype == 'f16' else ''}f32, or --allow-loss to write it all the same",
            )
        return cost

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("error", "total"),
            Column(
                "worst",
                lambda cost: {"module": cost.module, "error": cost.worst} if cost.module else None,
                type=[{"module": str, "error": float}, None],
            ),
        )

    def __str__(self) -> str:
        return (
            f"rounding    ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.total)} over all modules, "
            f"at most {percent(self.worst)} ({self.module})"
        )


def round_factors(adapter: Adapter, dtype: DType | None, *, made_from: Adapter | None = None) -> Adapter:
    """The adapter with all factors rounded once to a dtype.

    None keeps factors as they are. Products of stored tensors, such as those of a LoHa, get the dtype of these tensors;
    ``made_from`` has the modules before they became pairs.

    Raises
    ------
    FormatError
        A number is too large for ``dtype``; this is raised when the factor is read.
    """
    modules = {}
    for name, module in adapter.items():
        kind = dtype or product_dtype((made_from or adapter)[name])
        # Without a dtype, what is not a pair stays as it is.
        modules[name] = cast_factors(module, kind) if kind and (dtype or isinstance(module, LowRank)) else module
    # Rounding is lazy: a number that does not fit is found only while the file is written, and has to name its module.
    changed = {name: locate_errors(name, new) for name, new in modules.items() if new is not adapter[name]}
    return replace(adapter, modules={**modules, **changed}) if changed else adapter


def _is_surely_equal(before: Update, after: Update) -> bool:
    """Whether scales and dtypes alone show that two updates have the same factors. False if they leave it open."""
    if not isinstance(before, LowRank) or not isinstance(after, LowRank) or before.scale != after.scale:
        return False
    pairs = zip(before.factors, after.factors, strict=True)
    # Every float8, float16 and bfloat16 number is a float32 number too.
    return all(old.dtype == new.dtype or (old.dtype.itemsize < 4 and new.dtype.itemsize >= 4) for old, new in pairs)
