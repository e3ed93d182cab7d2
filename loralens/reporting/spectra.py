"""The section of spectra: singular values, energy curves, effective ranks, and the energy of each module."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

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
from loralens.reporting.document import PageTable, Part, Picture, Section, SideBySide
from loralens.reporting.result_tables import ResultTables, kinds_table
from loralens.reporting.subject import Subject
from loralens.tables.numbers import percent, span

OUTLIERS = 20  # outliers that are listed: the least likely ones, which come first
Numbers = Mapping[str, int]
Column = tuple[str, list[Picture], list[PageTable]]  # the label of an adapter, its pictures and its tables


def spectra_section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """The section of spectra; all adapters share limits and colours, so that they can be compared."""
    measured = [subject for subject in subjects if subject.spectra]
    # Limits, colours and columns come from all adapters, and only then each is drawn.
    limits = singular_value_limits(subject.spectra for subject in measured)
    # Of all adapters, so that one that was trained on some blocks only has its columns below those of the others.
    blocks = all_blocks(name for subject in measured for name in subject.spectra)
    grids = [Grid.of(subject.spectra, subject.shares, blocks=blocks) for subject in measured]
    rank = effective_rank_scale(subject.spectra for subject in measured)
    share = energy_scale(grids, [subject.shares for subject in measured])
    columns: list[Column] = []
    for i, (subject, grid) in enumerate(zip(measured, grids, strict=True)):
        pictures = [_spectra_picture(subject, grid, numbers, limits, i), _energy_curves_picture(subject, i)]
        # Where every ΔW is 0, the maps would be crossed out from end to end.
        if subject.norm:
            pictures.append(_effective_rank_picture(subject, grid, numbers, rank, i))
            pictures.append(_energy_picture(subject, grid, numbers, share, i))
        columns.append((subject.label, pictures, _tables(subject, numbers, tables)))
    lead = (
        "The singular values σ₁ ≥ σ₂ ≥ … of ΔW = scale·B·A in every module. Energy is a share of Σσ² = ‖ΔW‖²: an "
        "update whose energy lies in few directions can be compressed to a low rank."
    )
    return Section("spectra", "Spectra", lead, _side_by_side(columns))


def _side_by_side(columns: Sequence[Column]) -> list[Part]:
    """The parts of one adapter as they are; for several adapters, the same part of each side by side."""
    # A single adapter has the width of the page, so its maps stand next to its energy curves.
    if len(columns) == 1:
        ((_, (spectra, energy, *maps), tables),) = columns
        return [spectra, *([SideBySide([("", [energy]), ("", maps)])] if maps else [energy]), *tables]
    most = max((len(pictures) for _, pictures, _ in columns), default=0)
    # Row by row, so that pictures of the same measure stand at the same height; an adapter of zeros has fewer.
    rows: list[Part] = [
        SideBySide([(label, [pictures[k]]) for label, pictures, _ in columns if k < len(pictures)]) for k in range(most)
    ]
    return [*rows, SideBySide([(label, tables) for label, _, tables in columns])]


def _spectra_picture(subject: Subject, grid: Grid, numbers: Numbers, limits: Limits | None, i: int) -> Picture:
    charts = singular_value_panels(subject.spectra, grid, limits, numbers)
    zero = sum(spectrum.spectral == 0 for spectrum in subject.spectra.values())
    colour = " in the colour of its block" if grid.ramp and grid.stacks else ""
    return Picture(
        f"spectra-{i + 1}",
        "Singular values",
        charts,
        f"Singular values σᵢ of ΔW on a log scale, one panel per kind, one line per module{colour}; a line ends where "
        f"σᵢ is 0 to rounding.{f' ΔW is 0 in {zero} modules, which have no line.' if zero else ''}",
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
    # 99 % of the energy is what the recommended rank keeps at least, see `compression.curve.LOSS`.
    curve = energy_curve(list(subject.spectra.values()))
    needed = next((k for k, share in enumerate(curve) if share >= 0.99), 0)
    directions = f"99 % needs {needed} of {len(curve) - 1} directions" if curve else "all of it is 0"
    return Picture(
        f"energy-{i + 1}",
        "Energy kept",
        [energy_chart(subject.spectra, subject.shares)],
        "Share of Σσ² in the k leading directions of every module, one line per kind of module.",
        "r equally strong directions give a straight line, k/r; the farther a curve lies above it, the lower a rank "
        "is enough",
        "Eckart & Young 1936; Hu et al. 2021, §7.2",
        f"Share of energy against directions kept, for {subject.label}; {directions}.",
    )


def _effective_rank_picture(subject: Subject, grid: Grid, numbers: Numbers, scale: ColourScale, i: int) -> Picture:
    return Picture(
        f"ranks-{i + 1}",
        "Effective rank",
        [effective_rank_map(subject.spectra, grid, scale, numbers)],
        f"Effective rank exp(−Σ p ln p), p = σ/Σσ, of nominal r = {span([s.rank for s in subject.spectra.values()])}: "
        "kinds are rows, blocks are columns.",
        "r where all directions are equally strong; two factors of pure noise give nearly that",
        "Roy & Vetterli 2007",
        f"Map of effective ranks of {subject.label}; {_effective_rank_range(subject)}.",
    )


def _energy_picture(subject: Subject, grid: Grid, numbers: Numbers, scale: ColourScale, i: int) -> Picture:
    total = len(subject.spectra)
    modules = "1 module" if total == 1 else f"the {total} modules"
    half = "there is one" if total == 1 else f"{half_energy_modules(subject)} of {total} modules hold half of it"
    return Picture(
        f"shares-{i + 1}",
        "Energy of each module",
        [energy_map(subject.spectra, subject.shares, grid, scale, numbers)],
        "The share of ‖ΔW‖² in each module: kinds are rows, blocks are columns. Larger weights can hold more, so "
        "compare modules of one kind.",
        f"{percent(1 / total)} each if the energy were spread evenly over {modules}",
        "Hu et al. 2021, §7.1 (which weights to adapt)",
        f"Map of the energy of {subject.label} over its modules; {half}.",
    )


def half_energy_modules(subject: Subject) -> int:
    """The fewest modules that hold half of the energy; ΔW must not be 0."""
    covered = accumulate(sorted(subject.shares.values(), reverse=True), initial=0.0)
    return next(count for count, share in enumerate(covered) if share >= 0.5)


def _tables(subject: Subject, numbers: Numbers, tables: ResultTables) -> list[PageTable]:
    """The modules by kind and by block, and the outliers where there are some."""
    kinds = by_kind(subject.spectra)
    # The filter of the page hides no row of the table of blocks: a word such as q_proj is in nearly all of them.
    listed = [
        kinds_table(lambda _: tables.groups("kind", kinds), subject.spectra, numbers),
        PageTable(tables.groups("block", by_block(subject.spectra)), folded=True),
    ]
    standouts = find_outliers(subject.spectra)[:OUTLIERS]
    modules = [[numbers[outlier.name]] for outlier in standouts]
    return [*listed, *([PageTable(tables.outliers(standouts), modules, folded=True)] if standouts else [])]
