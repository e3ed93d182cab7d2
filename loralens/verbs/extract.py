"""The verb ``extract``: makes an adapter from the difference of two models."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, get_args

from loralens.core.adapter import Adapter
from loralens.core.messages import note, tell_findings, warn
from loralens.core.names import some
from loralens.core.progress import progress
from loralens.core.ranks import Rule
from loralens.errors import OptionError, place
from loralens.formats import load, save
from loralens.formats.dialects.sizes import file_size
from loralens.formats.dialects.table import QUANTISED
from loralens.formats.models.checkpoint import Checkpoint, model_config, stores_conv1d
from loralens.formats.models.transformers_names import use_memory_names
from loralens.merging.extraction.extract import extract_adapter
from loralens.merging.extraction.extraction import ExtractedModule, Extraction
from loralens.merging.extraction.triplets import NoiseEdge
from loralens.tables.numbers import fixed, json_number, number, percent, shape
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.bases import read_checkpoint
from loralens.verbs.inputs.choices import (
    FLOAT_TYPES,
    TARGET_FORMATS,
    FloatType,
    TargetFormat,
    check_choice,
    numpy_dtype,
)
from loralens.verbs.outputs.form import writer_options
from loralens.verbs.outputs.rules import RULES, RankRules, option_names, optional_rule
from loralens.verbs.outputs.target import Target

Noise = Literal["rounding", "median"]
ModuleRow = tuple[str, ExtractedModule]  # and its name

FORMATS = tuple(name for name in TARGET_FORMATS if name != QUANTISED)
FULL = 2.0  # times the rounding noise, from which what is left over is said to be more than that
RENAMED = "modules are called in the adapter as transformers 5 calls them in memory, where PEFT looks for them"
NAMED = 5  # tensors that are named in a message before the others are counted


def _measure(key: str, title: str = "", **options: Any) -> Column[ModuleRow]:
    return Column(key, lambda row: getattr(row[1], key), title, **options)


COLUMNS: tuple[Column[ModuleRow], ...] = (
    Column("name", lambda row: row[0], "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row[1].shape), "out × in", shape, csv=False, priority=3),
    Column("out", lambda row: row[1].shape[0], json=False),
    Column("in", lambda row: row[1].shape[1], json=False),
    _measure("rank", "r", priority=ALWAYS),
    _measure("frobenius", "‖ΔW‖", text=number, priority=6),
    _measure("relative_error", "error", text=percent, priority=ALWAYS),
    _measure("energy_kept", "energy kept", text=fixed(".2%"), priority=5),
    _measure("svd_error"),
    _measure("noise"),
    Column("residue", lambda row: json_number(row[1].residue), "left / noise", number, priority=4),
)
EDGE_COLUMN: Column[ModuleRow] = Column("noise_edge", lambda row: row[1].edge, priority=2)


@dataclass(frozen=True, slots=True, repr=False)
class ExtractResult(Tabular):
    """The adapter between two checkpoints, and what it holds of their difference.

    Attributes
    ----------
    output : Path or None
        Where the adapter is, or would be.
    dry_run : bool
        Whether nothing was written.
    format : str
        The dialect that was asked for.
    extraction : Extraction
        The adapter, and what became of every difference.
    """

    base: str
    tuned: str
    output: Path | None
    dry_run: bool
    format: str
    extraction: Extraction

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self.extraction.adapter

    @property
    def modules(self) -> Mapping[str, ExtractedModule]:
        """What every module holds of its difference."""
        return self.extraction.modules

    def __repr__(self) -> str:
        return f"ExtractResult({len(self.modules)} modules, error {percent(self.extraction.relative_error)})"

    @property
    def table(self) -> Table[ModuleRow]:
        """The modules that differ, one a row."""
        edges = any(module.edge is not None for module in self.modules.values())
        edge = replace(EDGE_COLUMN, title="edge", text=number) if edges else EDGE_COLUMN
        title = f"{self.tuned} − {self.base}: {len(self.modules)} modules differ, {self.extraction.unchanged} do not"
        return Table(title, (*COLUMNS, edge), list(self.modules.items()))

    def tables(self) -> list[Table[ModuleRow]]:
        """The modules that differ."""
        return [self.table]

    def sentences(self) -> list[str]:
        """The error over all modules, the size of the adapter, and where it is."""
        extra = self.adapter.extra
        error = percent(self.extraction.relative_error)
        sentences = [f"error       ‖D−BA‖/‖D‖ = {error} over all modules, measured on every entry"]
        randomised = max((module.svd_error for module in self.modules.values()), default=0.0)
        if randomised:
            sentences.append(
                f"svd         randomised: √Σσ² known within {percent(randomised)}; --exact takes dense ones"
            )
        sentences.append(f"parameters  {self.adapter.parameters:,}")
        if extra:
            roles = ", ".join(sorted({tensor.role for tensor in extra.values()}))
            sentences.append(f"extra       {len(extra)} tensors kept in full ({roles})")
        if self.output or self.dry_run:
            written = f"{'would write' if self.dry_run else 'wrote'} {self.output or ''}".rstrip()
            sentences.append(f"{written}: {self.format}, {len(self.modules)} modules")
        return sentences

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        extraction = self.extraction
        return {
            "base": self.base,
            "tuned": self.tuned,
            "target": str(self.output) if self.output and not self.dry_run else None,
            "format": self.format,
            "modules": self.table.records(),
            "total": {
                "relative_error": extraction.relative_error,
                "share": extraction.share,
                "parameters": extraction.adapter.parameters,
                "unchanged": extraction.unchanged,
            },
            "extra": list(extraction.adapter.extra),
            "left_out": [
                {"key": tensor.key, "why": tensor.why, "frobenius": tensor.norm} for tensor in extraction.left_out
            ],
            "notes": list(extraction.notes),
        }


def extract(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    noise_edge: Noise | None = None,
    uniform: bool = False,
    exact: bool = False,
    to: TargetFormat = "peft",
    dtype: FloatType = "f32",
    modules: Sequence[str] = (),
    drop_extra: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    **rules: Unpack[RankRules],
) -> ExtractResult:
    """Make an adapter from the difference of two models: of a full fine-tune, or of a merge by another tool.

    One rule of ranks, as in `compress`, or ``noise_edge`` has to be given. Every weight matrix that differs becomes a
    pair of factors; embeddings only if ``modules`` asks for them (``"*"`` for all). Norms, biases and new heads are
    copied in full. Everything that differs and is not in the adapter is listed. The names are those of ``tuned``; for
    PEFT those that transformers 5 has in memory.

    Parameters
    ----------
    base, tuned : path
        Models: folders, safetensors files, or Hub ids in the local cache.
    output : path, optional
        File or folder to write; without it nothing is written, and the result holds the adapter.
    noise_edge : str, optional
        In place of a rule, keep the directions above the noise: ``rounding``, that of rounding to the dtype of
        ``tuned``,
        or ``median``, unknown noise estimated from the median of all singular values, if the difference has full rank.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    exact : bool
        Take dense SVDs in float64, which is slow for large matrices.
    to : str
        The dialect to write.
    dtype : str
        The dtype of all factors: ``f32``, ``bf16`` or ``f16``.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    drop_extra : bool
        Leave out what is not a matrix: norms, biases and new heads.
    overwrite : bool
        Replace what is already at ``output``.
    dry_run : bool
        Make the adapter, and write nothing.
    **rules : RankRules
        One rule of ranks: ``rank``, ``energy``, ``error``, ``sv_ratio``, ``parameters`` or ``size``.

    Raises
    ------
    OptionError
        No rule, or several; an unknown word; no matrix differs; an ``output`` where something would be lost.
    FormatError
        A file that cannot be read; NaN or infinity in a difference.
    """
    check_choice("noise_edge", noise_edge, get_args(Noise))
    check_choice("to", to, FORMATS)
    check_choice("dtype", dtype, FLOAT_TYPES)
    rule = _rule(noise_edge, rules)
    target = Target.of(output, overwrite=overwrite, dry_run=dry_run)
    target.check_inputs({"the base": base, "the tuned model": tuned})
    target.check_format(to)  # before hours of SVDs, not after them
    writing = writer_options(to, base)
    before, after = read_checkpoint(base), read_checkpoint(tuned)
    tuned_config = model_config(Path(tuned))

    def renamed(adapter: Adapter) -> Adapter:
        """The adapter under the names that its readers look for: PEFT looks for modules in memory."""
        return use_memory_names(adapter, tuned_config) if to == "peft" else adapter

    _check_noise(rule, after, tuned)
    total = sum(tensor.size for tensor in after.tensors.values() if tensor.ndim > 1)
    with place(tuned), progress("extracting", total) as step:
        extraction = extract_adapter(
            before.tensors,
            after.tensors,
            rule,
            base_config=model_config(Path(base)),
            tuned_config=tuned_config,
            base_model=str(base),
            modules=modules,
            one_rank=uniform,
            conv1d=stores_conv1d(Path(tuned)) or stores_conv1d(Path(base)),
            exact=exact,
            dtype=numpy_dtype(dtype),
            drop_extra=drop_extra,
            size=lambda adapter: file_size(renamed(adapter), to, **writing),
            threads=os.cpu_count() or 1,
            step=step,
        )
    adapter = renamed(extraction.adapter)
    if list(adapter) != list(extraction.adapter):
        extraction = replace(extraction, adapter=adapter, notes=(*extraction.notes, RENAMED))
    if target.written:
        save(extraction.adapter, target.written, format=to, overwrite=overwrite, **writing)
        back = load(target.written, format=to, base=base, allow_pickle=True)
        tell_findings(str(target.written), back.findings)
    _tell(extraction)
    return ExtractResult(str(base), str(tuned), target.output, dry_run, to, extraction)


def _rule(noise_edge: Noise | None, rules: RankRules) -> Rule | NoiseEdge:
    """The one rule of ranks."""
    names = [name for name, value in rules.items() if value is not None]
    unknown = [name for name in names if name not in RULES]
    if unknown:
        raise TypeError(f"extract() got an unexpected keyword argument {unknown[0]!r}")
    if noise_edge is not None and names:
        raise OptionError(f"--noise-edge and {option_names(names[0])} exclude each other", fix="give one of them")
    rule = NoiseEdge(noise_edge) if noise_edge is not None else optional_rule(**rules)
    if rule is None:
        raise OptionError(
            "nothing says how many directions to keep",
            fix="give one of --rank, --energy, --error, --sv-ratio, --parameters, --size and --noise-edge",
        )
    return rule


def _check_noise(rule: Rule | NoiseEdge, tuned: Checkpoint, path: str | PathLike[str]) -> None:
    """Refuse to know the rounding of weights that were multiplied since."""
    if isinstance(rule, Rule) or rule.noise != "rounding":
        return
    if any(finding.code == "float8" for finding in tuned.notes):
        raise OptionError(
            f"{path}: of float8 weights with scales the rounding noise is not known here",
            fix="give --noise-edge median, or one of the other rules",
        )


def _tell(extraction: Extraction) -> None:
    """Notes, what is missing, and what rounding does not explain."""
    for text in extraction.notes:
        note(text)
    for why in dict.fromkeys(tensor.why for tensor in extraction.left_out):
        keys = [tensor.key for tensor in extraction.left_out if tensor.why == why]
        warn(f"{len(keys)} left out, {why}: {some(keys, NAMED)}")
    if extraction.share < 1:
        note(f"the adapter's modules hold {fixed('.2%')(extraction.share)} of the energy of all differences")
    full = [name for name, module in extraction.modules.items() if module.residue > FULL]
    if full:
        note(
            f"of {len(full)} modules more is left over than rounding explains (left / noise), {full[0]} among them: "
            "the difference has more directions than were kept"
        )
