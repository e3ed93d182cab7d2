"""The section of spectra: singular values, energy curves, effective ranks, and the energy of each module."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from loralens.analysis.spectrum import Group, Spectrum, by_block, by_kind
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
from loralens.reporting.document import PageTable, Part, Picture, PictureRow, Section, SideBySide
from loralens.reporting.result_tables import ResultTables, join_tables, kinds_table
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, percent, span

OUTLIERS = 20  # outliers that are listed: the least likely ones, which come first
Numbers = Mapping[str, int]


def spectra_section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """The section of spectra; all adapters share limits and colours, so that they can be compared."""
    measured = [subject for subject in subjects if subject.spectra]
    # Limits, colours and columns come from all adapters, and only then each is drawn.
    limits = singular_value_limits(subject.spectra for subject in measured)
    # The blocks of all adapters, so that a block has the same column in every map. This holds also for the map of an
    # adapter that was trained on some blocks only.
    blocks = all_blocks(name for subject in measured for name in subject.spectra)
    grids = [Grid.of(subject.spectra, subject.shares, blocks=blocks) for subject in measured]
    rank = effective_rank_scale(subject.spectra for subject in measured)
    share = energy_scale(grids, [subject.shares for subject in measured])
    pictures: list[list[Picture]] = []
    for i, (subject, grid) in enumerate(zip(measured, grids, strict=True)):
        own = [_spectra_picture(subject, grid, numbers, limits, i), _energy_curves_picture(subject, i)]
        # Where every ΔW is 0, the maps would be crossed out from end to end.
        if subject.norm:
            own.append(_effective_rank_picture(subject, grid, numbers, rank, i))
            own.append(_energy_picture(subject, grid, numbers, share, i))
        pictures.append(own)
    labels = [subject.label for subject in measured]
    parts = [*_arrange(labels, pictures), *_tables(measured, numbers, tables)]
    lead = (
        "The singular values σ₁ ≥ σ₂ ≥ … of ΔW = scale·B·A in every module. Energy is a share of Σσ² = ‖ΔW‖²: an "
        "update whose energy lies in few directions can be compressed to a low rank."
    )
    return Section("spectra", "Spectra", lead, parts)


def _arrange(labels: Sequence[str], pictures: Sequence[Sequence[Picture]]) -> list[Part]:
    """The pictures of one adapter as they are; those of several adapters in one row for each measure."""
    # A single adapter has the width of the page, so its maps stand next to its energy curves.
    if len(pictures) == 1:
        spectra, energy, *maps = pictures[0]
        return [spectra, SideBySide([("", [energy]), ("", maps)]) if maps else energy]
    most = max(map(len, pictures), default=0)
    # An adapter of zeros has fewer pictures.
    return [
        PictureRow([(label, own[k]) for label, own in zip(labels, pictures, strict=True) if k < len(own)])
        for k in range(most)
    ]


def _spectra_picture(subject: Subject, grid: Grid, numbers: Numbers, limits: Limits | None, i: int) -> Picture:
    charts = singular_value_panels(subject.spectra, grid, limits, numbers)
    zero = sum(spectrum.spectral == 0 for spectrum in subject.spectra.values())
    return Picture(
        f"spectra-{i + 1}",
        "Singular values",
        charts,
        "Singular values σᵢ of ΔW on a log scale, one panel per kind, one line per module, in the colour of its block "
        "where there are blocks; a line ends where σᵢ is 0 up to rounding.",
        "there is no single level: two factors of pure noise give a nearly flat line, which falls by less than half "
        "from the first direction to the last where r is far below the size of the weight; a steep line shows "
        "structure",
        "Hu et al. 2021, §7.2 (subspaces of different r); the measures as in the glossary",
        f"Singular values of {subject.label}, by kind of module; {_effective_rank_range(subject)}.",
        keys=grid.ramp,
        remark=f"ΔW is 0 in {count(zero, 'module')}: there is no line." if zero else "",
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
        "r equally strong directions give a straight line, k/r; the farther a curve lies above it, the fewer "
        "directions are enough",
        "Eckart & Young 1936; Hu et al. 2021, §7.2",
        f"Share of energy against directions kept, for {subject.label}; {directions}.",
    )


def _effective_rank_picture(subject: Subject, grid: Grid, numbers: Numbers, scale: ColourScale, i: int) -> Picture:
    return Picture(
        f"ranks-{i + 1}",
        "Effective rank",
        [effective_rank_map(subject.spectra, grid, scale, numbers)],
        "Effective rank exp(−Σ p ln p), p = σ/Σσ: kinds are rows, blocks are columns.",
        "r where all directions are equally strong; two factors of pure noise give nearly that",
        "Roy & Vetterli 2007",
        f"Map of effective ranks of {subject.label}; {_effective_rank_range(subject)}.",
        remark=f"Nominal rank r = {span([s.rank for s in subject.spectra.values()])}.",
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
        remark=f"{half[:1].upper()}{half[1:]}." if total > 1 else "",
    )


def half_energy_modules(subject: Subject) -> int:
    """The fewest modules that hold half of the energy; ΔW must not be 0."""
    covered = accumulate(sorted(subject.shares.values(), reverse=True), initial=0.0)
    return next(count for count, share in enumerate(covered) if share >= 0.5)


def _tables(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> list[PageTable]:
    """The modules by kind and by block, and the outliers where there are some; one table each for all adapters."""
    kinds: list[PageTable] = []
    blocks: list[PageTable] = []
    outliers: list[PageTable] = []
    for subject in subjects:
        groups = by_kind(subject.spectra)
        kinds.append(kinds_table(partial(_groups_table, tables, groups), subject.spectra, numbers))
        # The filter of the page hides no row of the table of blocks: a word such as q_proj is in nearly all of them.
        blocks.append(PageTable(tables.groups("block", by_block(subject.spectra)), folded=True))
        standouts = subject.examination.outliers[:OUTLIERS]
        outliers.append(PageTable(tables.outliers(standouts), [[numbers[x.name]] for x in standouts], folded=True))
    labels = [subject.label for subject in subjects]
    return [part for listed in (kinds, blocks, outliers) for part in join_tables(labels, listed)]


def _groups_table(tables: ResultTables, groups: Sequence[Group], members: Mapping[str, Sequence[Spectrum]]) -> Any:
    """The table of kinds. The members of a kind are not needed, because its group was measured already."""
    del members
    return tables.groups("kind", groups)
