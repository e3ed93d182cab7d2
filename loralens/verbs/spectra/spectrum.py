"""The verb ``spectrum``: computes the singular values of ΔW, and the ranks and norms that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from loralens.analysis.spectrum import (
    Spectrum,
    by_block,
    by_kind,
    mean_effective_rank,
    measure_spectrum,
    total_norm,
    uniform_rank,
)
from loralens.choices import Sort
from loralens.core.adapter import Adapter
from loralens.core.messages import progress
from loralens.core.model_in_memory import ModelPath
from loralens.core.structured import Update
from loralens.core.threads import processor_count
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.tables.numbers import count, fixed, number, percent, spark, whole_percent
from loralens.tables.result import ResultMapping, ResultOfSeveral
from loralens.tables.table import Column, Columns, Keys, Table, label_column, rows_key, shape_columns
from loralens.verbs.shared.adapters import Source, labels, read_adapter, sources
from loralens.verbs.shared.options import ModuleChoice, Reading, check_choice

if TYPE_CHECKING:
    from loralens.analysis.amplification import WeightNorms

KEPT = 0.99  # of the energy: the convention for the rank that is recommended, see `truncation_plan.LOSS`
FRACTIONS = (0.9, 0.95, 0.99)  # of the energy, for which the rank is listed
OUTLIERS_TITLE = (
    "stand apart from others of their kind and shape (chance: probability of such a gap if nothing is unusual)"
)


class ModuleSpectrum(NamedTuple):
    """One row: the spectrum of a module, and the norms of its weight in the base where a base was given."""

    path: str
    name: str
    module: Update
    spectrum: Spectrum
    weight: "WeightNorms | None" = None

    @property
    def relative_frobenius(self) -> float | None:
        """‖ΔW‖_F / ‖W‖_F; None where W is 0, or where no base was given."""
        return self.spectrum.frobenius / self.weight.frobenius if self.weight and self.weight.frobenius else None

    @property
    def relative_spectral(self) -> float | None:
        """σ₁(ΔW) / σ₁(W); None where W is 0, or where no base was given."""
        return self.spectrum.spectral / self.weight.spectral if self.weight and self.weight.spectral else None


@dataclass(frozen=True, slots=True, repr=False)
class AdapterSpectra(ResultMapping[Spectrum]):
    """The spectra of one adapter: a mapping from module names to `Spectrum`.

    Attributes
    ----------
    path : str
        The label of the adapter: its path, if it was read from a file.
    spectra : mapping of str to Spectrum
        The spectra of all requested modules, in natural order.
    listed : sequence of str
        The names of the modules that ``top`` selects, in the order of ``sort``.
    weights : mapping of str to WeightNorms
        The norms of the base weights of the modules listed; empty if no base was given.
    """

    contents = "spectra"

    path: str
    adapter: Adapter
    spectra: Mapping[str, Spectrum]
    listed: Sequence[str]
    weights: "Mapping[str, WeightNorms]" = field(default_factory=dict)

    @property
    def rows(self) -> list[ModuleSpectrum]:
        """The modules listed, in the order of ``sort``."""
        return [
            ModuleSpectrum(self.path, name, self.adapter[name], self.spectra[name], self.weights.get(name))
            for name in self.listed
        ]

    def listing(self) -> list[Table[ModuleSpectrum]]:
        """The modules listed, one module per row."""
        all_modules = count(len(self), "module")
        modules = f"{len(self.listed)} of {all_modules}" if len(self.listed) < len(self) else all_modules
        # The norm is that of the whole adapter, also where --top lists only a part of it.
        title = f"{self.path}: {modules}, ‖ΔW‖F = {number(total_norm(self.spectra.values()))} in all"
        # A dense SVD reports an error of 0, so the sentence appears only where a randomised SVD was used.
        errors = (norms.spectral_error / norms.spectral for norms in self.weights.values() if norms.spectral)
        worst = max(errors, default=0.0)
        title += f"; σ₁(W) by randomised SVD, error at most {fixed('.1%')(worst)}" if worst else ""
        columns = (*COLUMNS, *(BASE_COLUMNS if self.weights else ()), BARS)
        return [Table(title, columns, self.rows, lambda row: not row.spectrum.frobenius, _sum_up_zeros)]

    def tables(self) -> list[Table[Any]]:
        """The modules, kinds, blocks, and the modules that stand apart."""
        # Imported here because scripts call --json in loops, and these tables are for people only.
        from loralens.analysis.spectrum import find_outliers
        from loralens.verbs.shared.module_groups import OUTLIER_COLUMNS, groups_table

        return [
            *self.listing(),
            groups_table("kind", by_kind(self.spectra)),
            groups_table("block", by_block(self.spectra)),
            Table(OUTLIERS_TITLE, OUTLIER_COLUMNS, find_outliers(self.spectra)),
        ]

    def conclusion(self) -> list[str]:
        """How much of its rank the adapter uses, and with a base how large its update is in relation to W."""
        most = max((spectrum.rank for spectrum in self.spectra.values()), default=0)
        rank, energy = uniform_rank(self.spectra.values(), KEPT)
        if not rank:
            return [f"{self.path} does nothing: ΔW is 0 in every module."]
        effective = f"the effective rank is {mean_effective_rank(self.spectra.values()):.1f} on average"
        if rank < most:
            text = f"Rank {rank} in every module keeps {percent(energy)} of the energy of {self.path} (rank {most})"
        else:
            share = whole_percent(KEPT)
            text = f"{self.path} uses its rank of {most}: no lower rank in every module keeps {share} of the energy"
        relative = [row.relative_frobenius for row in self.rows if row.relative_frobenius is not None]
        on_base = f" ‖ΔW‖ is {percent(median(relative))} of ‖W‖ in the median." if relative else ""
        return [f"{text}; {effective}.{on_base}"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "path",
            Column("format", "adapter.format"),
            Column("base_model", "adapter.base_model"),
            rows_key(
                "modules",
                (*COLUMNS, *(replace(column, may_lack=True) for column in BASE_COLUMNS)),
                ModuleSpectrum,
                "listing.0",
            ),
            Column(("total", "modules"), "listed.len", type=int),
            Column(
                ("total", "parameters"), lambda spectra: sum(row.module.parameters for row in spectra.rows), type=int
            ),
            Column(("total", "bytes"), lambda spectra: sum(row.module.nbytes for row in spectra.rows), type=int),
            Column(
                ("total", "frobenius"),
                lambda spectra: total_norm(spectra.spectra[name] for name in spectra.listed),
                type=float,
            ),
            Column("findings", "adapter.findings"),
        )


@dataclass(frozen=True, slots=True, repr=False)
class SpectrumResult(ResultOfSeveral, ResultMapping[Spectrum]):
    """The spectra of adapters.

    The result for a single adapter is a mapping: ``result["model.layers.0.self_attn.q_proj"]`` is the `Spectrum` of a
    module, and iteration is over module names. With several adapters, use ``result.adapters``.

    Attributes
    ----------
    base : str or None
        The base model that ΔW was compared with.
    """

    contents = "only"

    adapters: Sequence[AdapterSpectra]
    base: str | None = None

    @property
    def only(self) -> AdapterSpectra:
        """The spectra of the only adapter.

        Raises
        ------
        OptionError
            The result holds several adapters, so a module name alone does not say which one is meant.
        """
        if len(self.adapters) != 1:
            raise OptionError(f"these are the spectra of {len(self.adapters)} adapters", fix="choose one: .adapters[0]")
        return self.adapters[0]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (Column("base", lambda result: result.base or ..., type=str, may_lack=True), "adapters")


@takes_options
def spectrum(
    *adapters: Source,
    top: int | None = None,
    sort: Sort | None = None,
    base: ModelPath | None = None,
    device: str | None = None,
    selection: ModuleChoice,
    reading: Reading,
) -> SpectrumResult:
    """Show the singular values of ΔW = scale·B·A for every module, and the ranks and norms that follow from them.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. ΔW is never formed: the cost is O((out +
    in)·r²) per module.

    Parameters
    ----------
    *adapters : path, Adapter or model
        Files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load` returns.
    top : int, optional
        Show only the first N modules in the order of ``sort``.
    sort : str, optional
        The quantity that modules are sorted by, largest first; 'name' sorts by name. [default: name; with ``top``:
        frobenius]
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Also say how large ΔW is
        in relation to W.
    device : str, optional
        The device for computations on W: cpu, cuda or cuda:N. [default: cpu]
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob that matches nothing; an unknown ``sort``; a device without a base.
    FormatError
        A file that is not an adapter; a module that holds NaN or Inf.
    MismatchError
        A module that has no weight in the base.

    Examples
    --------
    $ loralens spectrum adapter
    $ loralens spectrum adapter --top 10 --plot spectra.png
    """
    modules = selection.globs
    check_choice("sort", sort, get_args(Sort))
    if top is not None and top < 1:
        raise OptionError(f"top {top} leaves nothing to list", fix="give a whole number of 1 or more")
    # Without a base nothing would run on the device, and a user who names a GPU should learn that.
    if device and not base:
        raise OptionError("device is for computations on the base, and no base is given", fix="give base, or no device")
    chosen = sources(adapters)
    measured = []
    # All adapters are read before the base: reading them is quick, and an unreadable one should not come up late.
    for source, label in zip(chosen, labels(chosen), strict=True):
        adapter = read_adapter(source, reading, base=base, label=label)
        with place(label), progress(f"reading {label}", len(adapter)) as step:
            # One thread a core: BLAS itself is limited to one thread, and modules are independent of each other.
            modules_measured = measure_spectrum(adapter, modules=modules, threads=processor_count(), step=step)
        measured.append(AdapterSpectra(label, adapter, modules_measured, _ordered_names(modules_measured, sort, top)))
    if base is None:
        return SpectrumResult(measured)
    # Imported here because it takes as long as NumPy itself, and most spectra are measured without a base.
    from loralens.analysis.amplification import weight_norms
    from loralens.linalg.device import Device
    from loralens.verbs.shared.adapters import base_weights

    # The option has no default of its own, so that a device without a base can be refused.
    linalg_device = Device.of(device or "cpu", threads=processor_count())
    compared = []
    for spectra in measured:
        # Weights of the base are large: only those of the modules that the table shows are read.
        weights = base_weights(base, {name: spectra.adapter[name] for name in spectra.listed}).modules
        with place(base), progress("reading the base", len(weights)) as step:
            compared.append(replace(spectra, weights=weight_norms(weights, device=linalg_device, step=step)))
    return SpectrumResult(compared, str(base))


def _sum_up_zeros(modules: int) -> str:
    return f"{count(modules, 'module')} with ΔW = 0"


def _ordered_names(spectra: Mapping[str, Spectrum], sort: Sort | None, top: int | None) -> list[str]:
    """The modules to list: in natural order, or with the largest first; ``top`` alone means the largest norms."""
    # Whoever asks for a few modules without naming a quantity means those that change the model most.
    key = sort or ("frobenius" if top else "name")
    names = list(spectra)
    if key != "name":
        # The sort is stable, so modules of equal value stay in natural order.
        names.sort(key=lambda name: getattr(spectra[name], key), reverse=True)
    return names[:top]


def _measure_column(key: str, title: str = "", **options: Any) -> Column[ModuleSpectrum]:
    return Column(key, f"spectrum.{key}", title, **options)


def _energy_column(fraction: float) -> Column[ModuleSpectrum]:
    title = f"E{100 * fraction:.0f}" if fraction != 0.95 else ""  # two of the three fit a terminal
    about = f"directions that hold {100 * fraction:.0f} % of the energy"
    key = "energy_rank", f"{fraction:g}"  # JSON nests them: {"energy_rank": {"0.9": 3, …}}
    return Column(key, lambda row: row.spectrum.energy_rank(fraction), title, priority=4, about=about, type=int)


# The report lists modules by these columns too (`loralens.verbs.pages.page`).
# On a narrow terminal scale and shape are left out first, as they are often the same in all modules. The norm, the
# nominal rank and the effective rank stay longest, as most users ask how much of the rank is used.
COLUMNS: Columns[ModuleSpectrum] = (
    Column("path", "path", json=False),  # in JSON it stands once, at the adapter
    label_column("name", "module"),
    *shape_columns("spectrum.shape", "out × in"),
    Column("rank", "spectrum.rank", "r", priority=7, about="nominal rank"),
    Column("scale", "module.scale", "scale", number, priority=2, about="the number before B·A"),
    Column("scale_source", "module.scaling", csv=False),
    Column("dtype", "module.dtype"),
    _measure_column("frobenius", "‖ΔW‖F", text=number, priority=8, about="length of ΔW: √Σσ²", matters="largest"),
    _measure_column("spectral", "σ₁", text=number, priority=5, about="largest singular value"),
    _measure_column("nuclear"),
    _measure_column("numerical_rank"),
    _measure_column("stable_rank", "stable", text=fixed(".2f"), priority=5, about="stable rank: Σσ²/σ₁²"),
    _measure_column(
        "effective_rank",
        "effective",
        text=fixed(".2f"),
        priority=6,
        about="effective rank: exp of the entropy of σ/Σσ; of r equal σ it is r",
    ),
    _measure_column("effective_rank_energy"),
    _measure_column("participation_ratio"),
    *map(_energy_column, FRACTIONS),
    # Last, as the only cell whose length grows with the rank.
    Column("singular_values", "spectrum.s", type=list[float]),
)
BASE_COLUMNS: Columns[ModuleSpectrum] = (
    Column("weight_frobenius", "weight.frobenius", type=float),
    Column("weight_spectral", "weight.spectral", type=float),
    Column("weight_spectral_error", "weight.spectral_error", type=float),
    Column(
        "relative_frobenius",
        "relative_frobenius",
        "‖ΔW‖/‖W‖",
        number,
        priority=8,
        about="the length of ΔW compared with that of W",
    ),
    Column(
        "relative_spectral",
        "relative_spectral",
        "σ₁/σ₁(W)",
        number,
        priority=7,
        about="the strongest direction of ΔW compared with that of W",
    ),
)
# For people alone: machines have the singular values themselves.
BARS: Column[ModuleSpectrum] = Column(
    "bars",
    "spectrum.s",
    "spectrum",
    spark,
    align="left",
    json=False,
    csv=False,
    drawn=True,
    about="σ₁, σ₂, … as bars",
)
