"""The section of spectra: singular values, energy curves, effective ranks, and where the energy sits."""

from collections.abc import Mapping, Sequence

from loralens.analysis.groups import by_block, by_kind
from loralens.analysis.outliers import outliers
from loralens.charts.grid import Grid, all_blocks, mean
from loralens.charts.spec import Limits, Scale
from loralens.charts.spectrum import (
    effective_rank_map,
    effective_rank_scale,
    energy_chart,
    energy_curve,
    energy_map,
    energy_scale,
    singular_value_limits,
    singular_value_panels,
)
from loralens.core.names import kind
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent, span

OUTLIERS = 20  # modules that are listed
Numbers = Mapping[str, int]
Labelled = tuple[str, Sequence[Part]]


def section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """Spectra of all adapters, on common scales."""
    alive = [one for one in subjects if one.spectra]
    limits = singular_value_limits(one.spectra for one in alive)
    blocks = all_blocks(name for one in alive for name in one.spectra)
    grids = [Grid.of(one.spectra, one.shares, blocks=blocks) for one in alive]
    rank = effective_rank_scale(one.spectra for one in alive)
    share = energy_scale(grids, [one.shares for one in alive])
    columns: list[Labelled] = []
    for i, (one, grid) in enumerate(zip(alive, grids, strict=True)):
        maps = [_ranks(one, grid, numbers, rank, i), _shares(one, grid, numbers, share, i)] if one.norm else []
        pictures = [_spectra(one, grid, numbers, limits, i), _energy(one, i), *maps]
        listed = [_kinds(one, numbers, tables), _blocks(one, tables), *_outliers(one, numbers, tables)]
        columns.append((one.label, [*pictures, *listed]))
    lead = (
        "ΔW = scale·B·A of every module, by its singular values σ₁ ≥ σ₂ ≥ … Energy is the part of Σσ² = ‖ΔW‖²; what "
        "lies in few directions can be kept in few."
    )
    return Section("spectra", "Spectra", lead, _side_by_side(columns))


def _side_by_side(columns: Sequence[Labelled]) -> list[Part]:
    """The parts of one adapter as they are; of several, all that belongs together side by side."""
    if len(columns) == 1:
        (spectra, energy, *maps), tables = _sorted(columns[0][1])
        return [spectra, *([Beside([("", [energy]), ("", maps)])] if maps else [energy]), *tables]
    each = [(label, *_sorted(parts)) for label, parts in columns]
    pictures = [(label, drawn) for label, drawn, _ in each]
    most = max((len(parts) for _, parts in pictures), default=0)
    rows: list[Part] = [
        Beside([(label, [parts[k]]) for label, parts in pictures if k < len(parts)]) for k in range(most)
    ]
    return [*rows, Beside([(label, tables) for label, _, tables in each])]


def _sorted(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """Pictures, and tables."""
    tables: list[Part] = [part for part in parts if isinstance(part, PageTable)]
    return [part for part in parts if not isinstance(part, PageTable)], tables


def _spectra(one: Subject, grid: Grid, numbers: Numbers, limits: Limits | None, i: int) -> Picture:
    charts = singular_value_panels(one.spectra, grid, limits, numbers)
    zero = sum(spectrum.spectral == 0 for spectrum in one.spectra.values())
    order = " in the colour of its block" if grid.ramp and grid.stacks else ""
    caption = (
        f"Singular values σᵢ of ΔW on a log scale, a panel a kind, a line a module{order}; a line ends where σᵢ is 0"
    )
    caption += f" to rounding. {zero} modules are 0 and have no line." if zero else " to rounding."
    return Picture(
        f"spectra-{i + 1}",
        "Singular values",
        charts,
        caption,
        "A steep line is structure. There is no one level of chance: factors of pure noise give a nearly flat line, "
        "falling by less than a half from the first direction to the last where r is far below the size of the weight",
        "Hu et al. 2021, §7.2 (subspaces of different r); the measures as in the glossary",
        f"Singular values of {one.label}, by kind of module; {_spread(one)}.",
        keys=grid.ramp,
    )


def _spread(one: Subject) -> str:
    ranks = [spectrum.effective_rank for spectrum in one.spectra.values() if spectrum.spectral > 0]
    if not ranks:
        return "all of them are 0"
    return f"effective ranks run from {min(ranks):.1f} to {max(ranks):.1f}, {mean(ranks):.1f} in the mean"


def _energy(one: Subject, i: int) -> Picture:
    chart = energy_chart(one.spectra, one.shares)
    return Picture(
        f"energy-{i + 1}",
        "Energy kept",
        [chart],
        "Share of Σσ² that the k leading directions of every module hold, over the modules of each kind.",
        "k directions of r equal ones hold k/r: a straight line. The farther a curve lies above it, the more rank is "
        "to spare",
        "Eckart & Young 1936; Hu et al. 2021, §7.2",
        f"Share of energy against directions kept, for {one.label}; {_thrift(one)}.",
    )


def _thrift(one: Subject) -> str:
    whole = energy_curve(list(one.spectra.values()))
    if not whole:
        return "all of it is 0"
    return f"99 % needs {next(k for k, share in enumerate(whole) if share >= 0.99)} of {len(whole) - 1} directions"


def _ranks(one: Subject, grid: Grid, numbers: Numbers, scale: Scale, i: int) -> Picture:
    chart = effective_rank_map(one.spectra, grid, scale, numbers)
    return Picture(
        f"ranks-{i + 1}",
        "Effective rank",
        [chart],
        f"Effective rank exp(−Σ p ln p), p = σ/Σσ, of nominal r = {span([s.rank for s in one.spectra.values()])}: "
        "kinds down, blocks across.",
        "r where all directions are equally strong; noise of both factors gives nearly that",
        "Roy & Vetterli 2007",
        f"Map of effective ranks of {one.label}; {_spread(one)}.",
    )


def _shares(one: Subject, grid: Grid, numbers: Numbers, scale: Scale, i: int) -> Picture:
    even = 1 / max(len(one.spectra), 1)
    chart = energy_map(one.spectra, one.shares, grid, scale, numbers)
    return Picture(
        f"shares-{i + 1}",
        "Where the energy sits",
        [chart],
        "The part of ‖ΔW‖² that lies in each module: kinds down, blocks across. Large weights can hold more, so "
        "compare within a kind.",
        f"{percent(even)} each, if it were spread evenly over {_all(one)}",
        "Hu et al. 2021, §7.1 (which weights to adapt)",
        f"Map of the energy of {one.label} over its modules; {_concentration(one)}.",
    )


def _all(one: Subject) -> str:
    return "1 module" if len(one.spectra) == 1 else f"the {len(one.spectra)} modules"


def _concentration(one: Subject) -> str:
    if len(one.spectra) == 1:
        return "there is one"
    return f"{half(one)} of {len(one.spectra)} modules hold half of it" if one.norm else "all of it is 0"


def half(one: Subject) -> int:
    """The fewest modules that hold half of the energy."""
    held, count = 0.0, 0
    for share in sorted(one.shares.values(), reverse=True):
        if held >= 0.5:
            break
        held, count = held + share, count + 1
    return count


def _kinds(one: Subject, numbers: Numbers, tables: ResultTables) -> PageTable:
    members: dict[str, list[int]] = {}
    for name in one.spectra:
        members.setdefault(kind(name), []).append(numbers[name])
    groups = by_kind(one.spectra)
    return PageTable(tables.groups("kind", groups), [members.get(group.name, ()) for group in groups])


def _blocks(one: Subject, tables: ResultTables) -> PageTable:
    return PageTable(tables.groups("block", by_block(one.spectra)), folded=True)


def _outliers(one: Subject, numbers: Numbers, tables: ResultTables) -> list[PageTable]:
    apart = outliers(one.spectra)[:OUTLIERS]
    modules = [[numbers[outlier.name]] for outlier in apart]
    return [PageTable(tables.outliers(apart), modules, folded=True)] if apart else []
