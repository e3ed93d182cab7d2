"""The section of spectra: singular values, energy curves, effective ranks, and the energy of each module."""

from collections.abc import Mapping, Sequence

from loralens.analysis.groups import by_block, by_kind
from loralens.analysis.outliers import find_outliers
from loralens.charts.grid import Grid, all_blocks, arithmetic_mean
from loralens.charts.spec import ColourScale, Limits
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
from loralens.reporting.document import PageTable, Part, Picture, Section, SideBySide
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent, span

OUTLIERS = 20  # outliers that are listed
Numbers = Mapping[str, int]
Labelled = tuple[str, Sequence[Part]]


def spectra_section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """The section of spectra; all adapters share limits and colours, so that they can be compared."""
    measured = [subject for subject in subjects if subject.spectra]
    limits = singular_value_limits(subject.spectra for subject in measured)
    blocks = all_blocks(name for subject in measured for name in subject.spectra)
    grids = [Grid.of(subject.spectra, subject.shares, blocks=blocks) for subject in measured]
    rank = effective_rank_scale(subject.spectra for subject in measured)
    share = energy_scale(grids, [subject.shares for subject in measured])
    columns: list[Labelled] = []
    for i, (subject, grid) in enumerate(zip(measured, grids, strict=True)):
        maps = (
            [
                _effective_rank_picture(subject, grid, numbers, rank, i),
                _energy_picture(subject, grid, numbers, share, i),
            ]
            if subject.norm
            else []
        )
        pictures = [_spectra_picture(subject, grid, numbers, limits, i), _energy_curves_picture(subject, i), *maps]
        listed = [
            _kinds_table(subject, numbers, tables),
            _blocks_table(subject, tables),
            *_outliers_tables(subject, numbers, tables),
        ]
        columns.append((subject.label, [*pictures, *listed]))
    lead = (
        "The singular values σ₁ ≥ σ₂ ≥ … of ΔW = scale·B·A in every module. Energy is a share of Σσ² = ‖ΔW‖²: an "
        "update whose energy lies in few directions can be compressed to a low rank."
    )
    return Section("spectra", "Spectra", lead, _side_by_side(columns))


def _side_by_side(columns: Sequence[Labelled]) -> list[Part]:
    """The parts of one adapter as they are; for several adapters, the same part of each side by side."""
    # A single adapter has the width of the page, so its maps stand next to its energy curves.
    if len(columns) == 1:
        (spectra, energy, *maps), tables = _split_tables(columns[0][1])
        return [spectra, *([SideBySide([("", [energy]), ("", maps)])] if maps else [energy]), *tables]
    labelled = [(label, *_split_tables(parts)) for label, parts in columns]
    pictures = [(label, drawn) for label, drawn, _ in labelled]
    most = max((len(parts) for _, parts in pictures), default=0)
    rows: list[Part] = [
        SideBySide([(label, [parts[k]]) for label, parts in pictures if k < len(parts)]) for k in range(most)
    ]
    return [*rows, SideBySide([(label, tables) for label, _, tables in labelled])]


def _split_tables(parts: Sequence[Part]) -> tuple[list[Part], list[Part]]:
    """The parts that are no tables, and the tables."""
    tables: list[Part] = [part for part in parts if isinstance(part, PageTable)]
    return [part for part in parts if not isinstance(part, PageTable)], tables


def _spectra_picture(subject: Subject, grid: Grid, numbers: Numbers, limits: Limits | None, i: int) -> Picture:
    charts = singular_value_panels(subject.spectra, grid, limits, numbers)
    zero = sum(spectrum.spectral == 0 for spectrum in subject.spectra.values())
    order = " in the colour of its block" if grid.ramp and grid.stacks else ""
    caption = f"Singular values σᵢ of ΔW on a log scale, one panel per kind, one line per module{order}; "
    caption += "a line ends where σᵢ is 0"
    caption += f" to rounding. ΔW is 0 in {zero} modules, which have no line." if zero else " to rounding."
    return Picture(
        f"spectra-{i + 1}",
        "Singular values",
        charts,
        caption,
        "there is no single level: two factors of pure noise give a nearly flat line, which falls by less than half "
        "from the first direction to the last where r is far below the size of the weight; a steep line shows "
        "structure",
        "Hu et al. 2021, §7.2 (subspaces of different r); the measures as in the glossary",
        f"Singular values of {subject.label}, by kind of module; {_effective_rank_range(subject)}.",
        keys=grid.ramp,
    )


def _effective_rank_range(subject: Subject) -> str:
    ranks = [spectrum.effective_rank for spectrum in subject.spectra.values() if spectrum.spectral > 0]
    if not ranks:
        return "all of them are 0"
    return f"effective ranks run from {min(ranks):.1f} to {max(ranks):.1f} with a mean of {arithmetic_mean(ranks):.1f}"


def _energy_curves_picture(subject: Subject, i: int) -> Picture:
    chart = energy_chart(subject.spectra, subject.shares)
    return Picture(
        f"energy-{i + 1}",
        "Energy kept",
        [chart],
        "Share of Σσ² in the k leading directions of every module, one line per kind of module.",
        "r equally strong directions give a straight line, k/r; the farther a curve lies above it, the lower a rank "
        "is enough",
        "Eckart & Young 1936; Hu et al. 2021, §7.2",
        f"Share of energy against directions kept, for {subject.label}; {_directions_needed(subject)}.",
    )


def _directions_needed(subject: Subject) -> str:
    total_curve = energy_curve(list(subject.spectra.values()))
    if not total_curve:
        return "all of it is 0"
    needed = next(k for k, share in enumerate(total_curve) if share >= 0.99)
    return f"99 % needs {needed} of {len(total_curve) - 1} directions"


def _effective_rank_picture(subject: Subject, grid: Grid, numbers: Numbers, scale: ColourScale, i: int) -> Picture:
    chart = effective_rank_map(subject.spectra, grid, scale, numbers)
    return Picture(
        f"ranks-{i + 1}",
        "Effective rank",
        [chart],
        f"Effective rank exp(−Σ p ln p), p = σ/Σσ, of nominal r = {span([s.rank for s in subject.spectra.values()])}: "
        "kinds are rows, blocks are columns.",
        "r where all directions are equally strong; two factors of pure noise give nearly that",
        "Roy & Vetterli 2007",
        f"Map of effective ranks of {subject.label}; {_effective_rank_range(subject)}.",
    )


def _energy_picture(subject: Subject, grid: Grid, numbers: Numbers, scale: ColourScale, i: int) -> Picture:
    even = 1 / max(len(subject.spectra), 1)
    modules = "1 module" if len(subject.spectra) == 1 else f"the {len(subject.spectra)} modules"
    chart = energy_map(subject.spectra, subject.shares, grid, scale, numbers)
    return Picture(
        f"shares-{i + 1}",
        "Energy of each module",
        [chart],
        "The share of ‖ΔW‖² in each module: kinds are rows, blocks are columns. Larger weights can hold more, so "
        "compare modules of one kind.",
        f"{percent(even)} each if the energy were spread evenly over {modules}",
        "Hu et al. 2021, §7.1 (which weights to adapt)",
        f"Map of the energy of {subject.label} over its modules; {_energy_distribution(subject)}.",
    )


def _energy_distribution(subject: Subject) -> str:
    if len(subject.spectra) == 1:
        return "there is one"
    return (
        f"{half_energy_modules(subject)} of {len(subject.spectra)} modules hold half of it"
        if subject.norm
        else "all of it is 0"
    )


def half_energy_modules(subject: Subject) -> int:
    """The fewest modules that hold half of the energy."""
    covered, count = 0.0, 0
    for share in sorted(subject.shares.values(), reverse=True):
        if covered >= 0.5:
            break
        covered, count = covered + share, count + 1
    return count


def _kinds_table(subject: Subject, numbers: Numbers, tables: ResultTables) -> PageTable:
    members: dict[str, list[int]] = {}
    for name in subject.spectra:
        members.setdefault(kind(name), []).append(numbers[name])
    groups = by_kind(subject.spectra)
    return PageTable(tables.groups("kind", groups), [members.get(group.name, ()) for group in groups])


def _blocks_table(subject: Subject, tables: ResultTables) -> PageTable:
    return PageTable(tables.groups("block", by_block(subject.spectra)), folded=True)


def _outliers_tables(subject: Subject, numbers: Numbers, tables: ResultTables) -> list[PageTable]:
    standouts = find_outliers(subject.spectra)[:OUTLIERS]
    modules = [[numbers[outlier.name]] for outlier in standouts]
    return [PageTable(tables.outliers(standouts), modules, folded=True)] if standouts else []
