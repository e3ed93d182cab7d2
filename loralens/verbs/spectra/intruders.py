"""The verb ``intruders``: finds singular vectors of W + ΔW that W does not have, and can shrink them."""

from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, get_args

from loralens.analysis.intruders import (
    THRESHOLD,
    TOP,
    Intruders,
    check_definition,
    check_plain,
    find_intruders,
    remove_intruders,
    replace_modules,
)
from loralens.choices import FloatType
from loralens.core.adapter import Adapter
from loralens.core.model_in_memory import ModelPath
from loralens.core.selection import select
from loralens.core.structured import Update
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats import save
from loralens.formats.dialects.dialect_table import FORMATS
from loralens.linalg.device import Device
from loralens.tables.numbers import count, fixed, number, or_blank, span
from loralens.tables.result import ResultMapping
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Recorded, Table, label_column, rows_key, shape_columns
from loralens.verbs.files.output import RoundingCost, Target, round_factors
from loralens.verbs.shared.adapters import AdapterSource, base_weights, find_source, read_adapter
from loralens.verbs.shared.module_groups import group_by_kind
from loralens.verbs.shared.options import ModuleChoice, Reading, SvdCaching, check_choice, numpy_dtype
from loralens.verbs.spectra.decompositions import decompositions, svd_cache


class ModuleIntruders(NamedTuple):
    """One row: a module, its rank, and what was found among the leading directions of its W + ΔW."""

    name: str
    rank: int
    intruders: Intruders

    @property
    def found(self) -> list[dict[str, float]]:
        """The intruders among the leading directions, counted from 1, as people count singular values."""
        s, scores = self.intruders.s, self.intruders.scores
        return [{"index": j + 1, "singular_value": s[j], "score": scores[j]} for j in self.intruders.indices.tolist()]

    @property
    def first(self) -> dict[str, float] | None:
        """The first intruder; None if there is none."""
        return next(iter(self.found), None)

    @property
    def counts(self) -> tuple[int, int]:
        """The number of intruders, and that of leading directions."""
        return self.intruders.count, self.intruders.s.size


@dataclass(frozen=True, slots=True)
class IntruderTotal:
    """Several modules, of one kind or all: their leading directions, the intruders, and their share of the energy."""

    kind: str
    modules: int
    directions: int
    count: int
    energy_share: float

    @classmethod
    def of(cls, modules: Collection[Intruders], kind: str = "") -> "IntruderTotal":
        """The sums over these modules."""
        # This is a share of sums, not a mean of shares: a module of small norm must not count as much as one of large
        # norm.
        energy = sum(float((module.s**2).sum()) for module in modules)
        intruding = sum(float((module.s[module.indices] ** 2).sum()) for module in modules)
        directions, found = sum(module.s.size for module in modules), sum(module.count for module in modules)
        return cls(kind, len(modules), directions, found, intruding / energy if energy else 0.0)

    @property
    def counts(self) -> tuple[int, int]:
        """The number of intruders, and that of leading directions."""
        return self.count, self.directions


@dataclass(frozen=True, slots=True)
class Removal(Recorded):
    """The adapter whose intruders have another strength, and where it was written.

    Attributes
    ----------
    strength : float
        The factor of every intruder: 0 removes them, 1 keeps them.
    changed : int
        The number of modules that were edited.
    rounding : RoundingCost
        The error from rounding the factors of these modules to the dtype that was asked for.
    format : str
        The dialect of the file: the adapter's own, or ``peft`` if that cannot be written.
    """

    adapter: Adapter
    strength: float
    changed: int
    rounding: RoundingCost
    format: str
    path: Path | None
    dry_run: bool

    @property
    def ranks(self) -> list[int]:
        """The smallest and the largest rank of a module."""
        # Every intruder adds one rank, so modules have different ranks unless they were made equal.
        ranks = [module.rank for module in self.adapter.modules.values()]
        return [min(ranks), max(ranks)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "strength",
            "path",
            "format",
            "dry_run",
            Column("modules", "adapter.len", type=int),
            "changed",
            "ranks",
            Column("parameters", "adapter.parameters"),
            "rounding",
        )


@dataclass(frozen=True, slots=True, repr=False)
class IntrudersResult(ResultMapping[Intruders]):
    """The intruders of an adapter in its base: a mapping from module names to `Intruders`.

    Attributes
    ----------
    path : str
        The label of the adapter: its path, if it was read from a file.
    top : int
        The number of leading directions that were examined in every module.
    ranks : mapping of str to int
        The rank of each module of the adapter.
    removal : Removal or None
        The edited adapter; None unless ``remove`` was given.
    """

    path: str
    base: str
    threshold: float
    top: int
    modules: Mapping[str, Intruders]
    ranks: Mapping[str, int]
    removal: Removal | None = None

    @property
    def adapter(self) -> Adapter | None:
        """The adapter whose intruders have another strength; None unless ``remove`` was given."""
        return self.removal.adapter if self.removal else None

    @property
    def total(self) -> IntruderTotal:
        """The sums over all modules."""
        return IntruderTotal.of(self.modules.values())

    def tables(self) -> list[Table[Any]]:
        """The modules, and the sums over the modules of a kind."""
        title = f"{self.path} on {self.base}: {self.top} leading directions, intruders score below {self.threshold:g}"

        def sum_up(modules: int) -> str:
            return f"{count(modules, 'module')} without an intruder"

        modules = Table(title, COLUMNS, self.rows, lambda row: not row.intruders.count, sum_up)
        return [modules, kinds_table("by kind", self.modules)]

    def conclusion(self) -> list[str]:
        """How many of the leading directions are intruders, how much energy they have, and in how many modules."""
        total, modules = self.total, count(len(self), "module")
        if not total.count:
            return [
                f"No intruders: all {total.directions:,} leading directions of W + ΔW in {modules} resemble one of W."
            ]
        with_any = sum(module.count > 0 for module in self.values())
        # The count is given with the share of the energy, as counts saturate where ‖ΔW‖ is large: in one study 57 % and
        # 99.7 % of the directions were intruders, with 43 % and 92 % of the energy (docs/commands/intruders.md).
        return [
            f"{total.count:,} of {total.directions:,} leading directions of W + ΔW are intruders, with "
            f"{PERCENT(total.energy_share)} of their energy, in {with_any} of {modules}."
        ]

    def sentences(self) -> list[str]:
        """Which vectors are not unique, and what was written."""
        sentences = []
        # Equal singular values share a subspace, of which any orthonormal basis is as right as another.
        tied = [name for name, module in self.items() if module.tied]
        if tied:
            equal = f"{len(tied)} modules have equal leading singular values (the first is {tied[0]})"
            sentences += [f"tied: {equal}; their vectors, and", "  so their scores and counts, are not unique"]
        removal = self.removal
        if removal and removal.path:
            # λ = 1 edits nothing, so no intruder counts as scaled.
            shrunk = count(self.total.count if removal.strength != 1 else 0, "intruder")
            changed = f"{removal.changed} of {len(removal.adapter)} modules changed"
            # Modules that did not change were not rounded.
            sentences += [str(removal.rounding)] if removal.rounding.module else []
            sentences.append(
                f"{'would write' if removal.dry_run else 'wrote'} {removal.path}: {removal.format}, {shrunk} scaled by "
                f"{number(removal.strength)}, {changed}, rank {span(removal.ranks)}"
            )
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("adapter", "path"),
            "base",
            "threshold",
            "top",
            rows_key("modules", COLUMNS, source="rows"),
            Column(("total", "modules"), len, type=int),
            *(Column(("total", key), f"total.{key}") for key in ("directions", "count", "energy_share")),
            Column("output", lambda result: result.removal or ..., type=Removal, may_lack=True),
        )

    @property
    def rows(self) -> list[ModuleIntruders]:
        """One row for every module."""
        return [ModuleIntruders(name, self.ranks[name], module) for name, module in self.items()]


PERCENT = fixed(".1%")
COUNTS: Column[Any] = Column(
    "counts",
    "counts",
    "intruders",
    lambda counts: f"{counts[0]}/{counts[1]}",
    priority=ALWAYS,
    about="of the leading directions of W + ΔW",
)
ENERGY: Column[Any] = Column(
    "energy_share",
    "energy_share",
    "energy",
    PERCENT,
    priority=8,
    about="their part of the energy of those directions",
)

# On a narrow terminal the shape and the details of the first intruder are left out first. The energy stays longest,
# because counts alone do not tell a good adapter from a harmful one.
COLUMNS: Columns[ModuleIntruders] = (
    label_column("name", "module"),
    *shape_columns("intruders.shape", "out × in", priority=2),
    Column("rank", "rank", "r", priority=4),
    # Machines get the number of intruders alone, and people get it with the number of directions.
    Column("count", "intruders.count"),
    replace(COUNTS, json=False, csv=False),
    replace(ENERGY, source="intruders.energy_share"),
    # JSON has them in the list of all intruders.
    Column("first", "first.index", "first", priority=5, json=False),
    Column("first_value", "first.singular_value", "its σ", or_blank(number), priority=3, json=False),
    Column("first_score", "first.score", "its score", or_blank(fixed(".3f")), priority=3, json=False),
    Column(
        "lowest_score",
        # Without directions the lowest score is 1, which is the score of a direction of W itself.
        lambda row: row.intruders.scores.min(initial=1.0),
        "lowest",
        fixed(".3f"),
        priority=7,
        json=False,
        about="the lowest score: the best |cosine| with any direction of W",
    ),
    # The control: nearly every random direction of a large weight is an intruder, so a low score alone proves little.
    Column(
        "random_score",
        "intruders.random_score",
        "random",
        fixed(".3f"),
        priority=5,
        about="the score of a random direction",
    ),
    Column("chance", "intruders.chance", "chance", number, priority=6),
    Column("singular_values", "intruders.s", type=list[float]),
    Column("scores", "intruders.scores", type=list[float]),
    Column("intruders", "found", type=({"index": int, "singular_value": float, "score": float},), csv=False),
    Column("tied", "intruders.tied"),
    Column("method", "intruders.method"),
)
KIND_COLUMNS: Columns[IntruderTotal] = (
    label_column("kind", "kind"),
    Column("modules", "modules", "modules", priority=5),
    COUNTS,
    ENERGY,
)


def kinds_table(title: str, intruders: Mapping[str, Intruders]) -> Table[IntruderTotal]:
    """The sums over the modules of each kind."""
    kinds = group_by_kind(intruders).items()
    return Table(title, KIND_COLUMNS, [IntruderTotal.of(modules, kind) for kind, modules in kinds])


@takes_options
def intruders(
    adapter: AdapterSource,
    *,
    base: ModelPath,
    target: Target,
    top: int = TOP,
    threshold: float = THRESHOLD,
    remove: float | None = None,
    uniform: bool = False,
    dtype: FloatType = "f32",
    allow_loss: bool = False,
    device: str = "cpu",
    caching: SvdCaching,
    selection: ModuleChoice,
    reading: Reading,
) -> IntrudersResult:
    """Find the leading singular directions of W + ΔW that no singular direction of W resembles (arXiv 2410.21228).

    The score of a direction is the largest |cosine| of its left singular vector with those of W. If it is below
    ``threshold``, the direction is an intruder. Nearly every random direction is an intruder too, as the column
    "chance" shows: a low score means that the direction is spread over many directions of W, not that it is new to W. W
    is decomposed once, and its SVD is kept. W + ΔW is not decomposed.

    Parameters
    ----------
    adapter : path, Adapter or model
    base : path or model
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache.
    top : int
        The number of leading singular directions of W + ΔW to look at.
    threshold : float
        A direction is an intruder if no |cosine| with a direction of W is as large as this.
    remove : float, optional
        Write an adapter in which every intruder is multiplied by λ: 0 removes them, 1 keeps them. Needs ``output``.

        Make an adapter in which every intruder is multiplied by this: 0 removes them, 1 keeps them. It is the
        ``adapter`` of the result.
    uniform : bool
        Give all modules the same rank, padded with zeros, as LoRAX and mlx-lm require.
    dtype : str
        The dtype of the factors that ``remove`` changes.
    allow_loss : bool
        Write even if rounding changes the update of a module by more than 1 %.
    target : Target
        The options ``output``, ``overwrite``, ``dry_run``: what ``remove`` writes.
    device : str
        The device for computations on W: cpu, cuda or cuda:N.
    caching : SvdCaching
        The options ``cache``, ``cache_limit``, ``no_cache``.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        An output and nothing to write; options that exclude each other, or make no sense; rounding that costs too much.
    FormatError
        A file that is not an adapter, or not a model; numbers that are NaN or Inf.
    MismatchError
        A module that has no weight in the base, or whose tuned weight is not W + ΔW (DoRA).

    Examples
    --------
    $ loralens intruders adapter --base model
    """
    check_definition(top=top, threshold=threshold)
    check_choice("dtype", str(dtype), get_args(FloatType))
    # Any finite factor is allowed: above 1 it makes the intruders stronger, below 0 it turns them around.
    if remove is not None and not isfinite(remove):
        raise OptionError(f"remove {remove!r} is not possible", fix="give a finite number: 0 removes, 1 keeps")
    if target.output is not None and remove is None:  # a forgotten `remove` would be noticed only after the search
        raise OptionError(
            f"nothing would be written to {target.output}", fix="give remove, the factor for the intruders"
        )
    store = svd_cache(caching)
    linalg_device = Device.of(device)
    adapter, label = find_source(adapter)
    loaded = read_adapter(adapter, reading, base=base, label=label)
    with place(label):
        names = select(loaded, selection.globs)
        # With a strength of 1 nothing is edited, so modules that are not pairs may stay.
        check_plain(loaded, names, pairs=remove not in (None, 1))
    target.check_source(adapter, base=base)  # what is read is never replaced
    # The SVDs of a base of 7B take an hour or so. What the writer would refuse is found before them, by a rehearsal.
    # The file has the adapter's own dialect, or PEFT's if that cannot be written.
    writable = any(form.name == loaded.format and form.writer for form in FORMATS)
    dialect = str(loaded.format) if writable else "peft"
    if target.output is not None:
        untouched = replace_modules(loaded, {})
        save(untouched, target.output, format=dialect, overwrite=target.overwrite, dry_run=True)
    weights = base_weights(base, {name: loaded[name] for name in names}).modules
    measured: dict[str, Intruders] = {}
    edited: dict[str, Update] = {}
    # Factors for a narrow dtype stay in float64 until all of them are there, so that they are rounded only once.
    edit_dtype = "float32" if dtype == "f32" else "float64"
    with closing(decompositions(weights, store, base, linalg_device)) as svds:
        for name, W in svds:
            with place(label), place(name):
                module = find_intruders(loaded[name], W, top=top, threshold=threshold)
                if remove is not None:
                    edited[name] = remove_intruders(loaded[name], module, strength=remove, dtype=edit_dtype)
                # Only the edit needs the vectors: 0.7 MB a module for ten directions of a 4096 × 4096 weight.
                measured[name] = module.without_vectors()
    result = IntrudersResult(label, str(base), threshold, top, measured, {name: loaded[name].rank for name in measured})
    if remove is None:
        return result
    # Modules without intruders did not change, and are written back bit for bit.
    exact = replace(loaded, modules={name: module for name, module in edited.items() if module is not loaded[name]})
    with place(label):
        rounded = round_factors(exact, numpy_dtype(dtype)).modules
        # The cost is that of all modules together, and names the worst one.
        cost = RoundingCost.between(exact, rounded, allow_loss=allow_loss, dtype=dtype)
    new = replace_modules(loaded, dict(rounded), uniform=uniform)
    if target.output is not None:
        save(new, target.output, format=dialect, overwrite=target.overwrite, dry_run=target.dry_run)
    return replace(result, removal=Removal(new, remove, len(rounded), cost, dialect, target.output, target.dry_run))
