"""The section of spectra: singular values, energy curves, effective ranks, and where the energy sits."""

from collections.abc import Mapping, Sequence

import numpy as np

from loralens.analysis.groups import by_block, by_kind
from loralens.analysis.outliers import outliers
from loralens.analysis.spectrum import Spectrum
from loralens.charts.figure import fit
from loralens.core.names import kind
from loralens.linalg.factor import Floats
from loralens.reporting.chart import Heat, Ink, Line, Lines, Scale
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section
from loralens.reporting.grid import NAME, Grid, mean
from loralens.reporting.palette import BLOCKS
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.reporting.words import number, percent, span

LINES = 128  # of one panel; beyond, one mean line a block
OUTLIERS = 20  # modules that are listed
Numbers = Mapping[str, int]
Labelled = tuple[str, Sequence[Part]]


def section(subjects: Sequence[Subject], numbers: Numbers, tables: ResultTables) -> Section:
    """Spectra of all adapters, on common scales."""
    alive = [one for one in subjects if one.spectra]
    limits = _limits(alive)
    rank, share = _rank_scale(alive), _share_scale(alive)
    columns: list[Labelled] = []
    for i, one in enumerate(alive):
        grid = Grid.of(one.spectra, one.shares)
        maps = [_ranks(one, grid, numbers, rank, i), _shares(one, grid, numbers, share, i)] if one.norm else []
        pictures = [_spectra(one, grid, numbers, limits, i), _energy(one, grid, i), *maps]
        columns.append(
            (
                one.label,
                [*pictures, _kinds(one, numbers, tables), _blocks(one, tables), *_outliers(one, numbers, tables)],
            )
        )
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


def _limits(subjects: Sequence[Subject]) -> tuple[float, float] | None:
    drawn = [s for one in subjects for spectrum in one.spectra.values() if (s := _solid(spectrum)).size]
    if not drawn:
        return None
    low, high = min(float(s[-1]) for s in drawn), max(float(s[0]) for s in drawn)
    margin = max((high / low) ** 0.05, 1.1)
    return low / margin, high * margin


def _solid(one: Spectrum) -> Floats:
    """The singular values that are not 0 to rounding."""
    return np.asarray(one.s[: one.numerical_rank], dtype=np.float64)


def _spectra(one: Subject, grid: Grid, numbers: Numbers, limits: tuple[float, float] | None, i: int) -> Picture:
    charts = []
    for row, name in enumerate(grid.kinds):
        lines = [line for j in range(len(grid.blocks)) for line in _lines(one, grid, row, j, numbers)]
        charts.append(Lines(fit(name, NAME), lines, "direction i", "σᵢ", log=True, y_range=limits))
    zero = sum(spectrum.spectral == 0 for spectrum in one.spectra.values())
    blocks = [b for b in grid.blocks if b]
    order = " from the first block (dark) to the last (bright)" if len(blocks) > 1 else ""
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
    )


def _spread(one: Subject) -> str:
    ranks = [spectrum.effective_rank for spectrum in one.spectra.values() if spectrum.spectral > 0]
    if not ranks:
        return "all of them are 0"
    return f"effective ranks run from {min(ranks):.1f} to {max(ranks):.1f}, {mean(ranks):.1f} in the mean"


def _lines(one: Subject, grid: Grid, row: int, column: int, numbers: Numbers) -> list[Line]:
    names = grid.cells.get((row, column), ())
    ink = _ink(grid, column)
    solid = {name: s for name in names if (s := _solid(one.spectra[name])).size}
    crowd = sum(len(members) for (r, _), members in grid.cells.items() if r == row) > LINES
    if crowd and len(solid) > 1:
        total = np.zeros(max(s.size for s in solid.values()))
        for s in solid.values():
            total[: s.size] += s
        label = f"mean of {len(solid)} modules of block {grid.columns[column]}"
        y = (total / len(solid)).tolist()
        return [Line(label, range(1, len(y) + 1), y, ink, [numbers[name] for name in solid])]
    return [
        Line(name, range(1, s.size + 1), s.tolist(), ink, [numbers[name]], dots=s.size <= 4)
        for name, s in solid.items()
    ]


def _ink(grid: Grid, column: int) -> Ink:
    places = sum(one is not None for one in grid.blocks)
    if grid.blocks[column] is None:
        return "quiet", 0
    return "block", round((BLOCKS - 1) * column / max(places - 1, 1))


def _energy(one: Subject, grid: Grid, i: int) -> Picture:
    members: dict[str, list[Spectrum]] = {}
    for (row, _), names in grid.cells.items():
        members.setdefault(grid.kinds[row], []).extend(one.spectra[name] for name in names)
    lines = [
        Line(fit(name, NAME), range(len(curve)), curve, ("series", k % 8), dashed=8 <= k < 16, dotted=k >= 16)
        for k, name in enumerate(grid.kinds)
        if (curve := _kept(members[name]))
    ]
    if len(lines) > 1:
        lines.append(
            Line(
                "all modules", range(len(whole := _kept(list(one.spectra.values())))), whole, ("quiet", 0), dashed=True
            )
        )
    chart = Lines(
        "", lines, "directions kept of every module", "share of energy", y_range=(0.0, 1.0),
        levels={"99 %": 0.99, "90 %": 0.9}, legend=True,
    )  # fmt: skip
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


def _kept(members: Sequence[Spectrum]) -> list[float]:
    """The share of energy in the first k directions of each, for k = 0 … r; nothing where all is 0."""
    most = max((spectrum.s.size for spectrum in members), default=0)
    energy = np.zeros(most + 1)
    unit = max((spectrum.spectral for spectrum in members), default=0.0)
    if not unit:
        return []
    for spectrum in members:
        energy[1 : spectrum.s.size + 1] += (spectrum.s / unit) ** 2
    return [float(share) for share in energy.cumsum() / energy.sum()]


def _thrift(one: Subject) -> str:
    whole = _kept(list(one.spectra.values()))
    if not whole:
        return "all of it is 0"
    return f"99 % needs {next(k for k, share in enumerate(whole) if share >= 0.99)} of {len(whole) - 1} directions"


def _rank_scale(subjects: Sequence[Subject]) -> Scale:
    values = [s.effective_rank for one in subjects for s in one.spectra.values() if s.spectral > 0] or [1.0]
    top = max((s.rank for one in subjects for s in one.spectra.values()), default=1)
    margin = max(0.0, max(top / 4, 1) - (max(values) - min(values))) / 2
    label = "effective rank (directions)"
    return Scale(max(min(values) - margin, 1.0), max(values) + margin, label, form=".2f")


def _ranks(one: Subject, grid: Grid, numbers: Numbers, scale: Scale, i: int) -> Picture:
    values = {name: s.effective_rank for name, s in one.spectra.items() if s.spectral > 0}

    def tip(name: str) -> str:
        s = one.spectra[name]
        return f"{name}: effective rank {s.effective_rank:.2f} of r = {s.rank}, stable rank {s.stable_rank:.2f}"

    chart = grid.heat("", values, scale, numbers=numbers, gather=mean, tip=tip)
    return Picture(
        f"ranks-{i + 1}",
        "Effective rank",
        [chart],
        f"Effective rank exp(−Σ p ln p), p = σ/Σσ, of nominal r = {span([s.rank for s in one.spectra.values()])}: "
        "kinds down, blocks across. Dotted: no module, or ΔW = 0.",
        "r where all directions are equally strong; noise of both factors gives nearly that",
        "Roy & Vetterli 2007",
        f"Map of effective ranks of {one.label}; {_spread(one)}.",
    )


def _share_scale(subjects: Sequence[Subject]) -> Scale:
    grids = [(one, Grid.of(one.spectra, one.shares)) for one in subjects]
    tops = [sum(one.shares[name] for name in names) for one, grid in grids for names in grid.cells.values()]
    return Scale(0.0, max(tops, default=0.0) or 1.0, "share of the adapter's energy", form=".2%")


def _shares(one: Subject, grid: Grid, numbers: Numbers, scale: Scale, i: int) -> Picture:
    even = 1 / max(len(one.spectra), 1)
    alone = all(len(names) == 1 for names in grid.cells.values())
    level = even if alone and even < scale.high else None
    shown = Scale(0.0, scale.high, scale.label, chance=level, form=".2%")

    def tip(name: str) -> str:
        return f"{name}: {percent(one.shares[name])} of the energy, ‖ΔW‖ {number(one.spectra[name].frobenius)}"

    chart: Heat = grid.heat("", one.shares if one.norm else {}, shown, numbers=numbers, gather=sum, tip=tip)
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
