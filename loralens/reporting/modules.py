"""The last section: every module in numbers, to be sorted and filtered."""

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

from loralens.charts.amplification import whole_rank
from loralens.reporting.document import Column, Entry, Row, Section, Table
from loralens.reporting.subject import Subject
from loralens.tables.numbers import fixed, number, percent

Numbers = Mapping[str, int]
FEW = 60  # modules up to which the table stands open
Cellular = Callable[[str], Entry]


def section(subjects: Sequence[Subject], numbers: Numbers) -> Section:
    """A table for each adapter."""
    tables = [_table(one, numbers) for one in subjects]
    return Section("modules", "Every module", "Click a heading to sort; the filter on top chooses modules.", tables)


def _table(one: Subject, numbers: Numbers) -> Table:
    def named(name: str) -> Entry:
        return Entry(name, numbers[name])

    columns: list[tuple[Column, Cellular]] = [(Column("module", words=True), named), *_own(one), *_beside(one)]
    rows = [Row([cell(name) for _, cell in columns], [numbers[name]]) for name in one.spectra]
    return Table(one.label, [column for column, _ in columns], rows, folded=len(rows) > FEW)


def _own(one: Subject) -> list[tuple[Column, Cellular]]:
    spectra = one.spectra

    def shape(name: str) -> Entry:
        out, in_ = spectra[name].shape
        return Entry(f"{out} × {in_}", out * in_)

    return [
        (Column("out × in"), shape),
        (Column("r", "nominal rank"), lambda n: Entry(str(spectra[n].rank), spectra[n].rank)),
        (Column("scale"), lambda n: _number(one.adapter[n].scale)),
        (Column("‖ΔW‖", "√Σσ²"), lambda n: _number(spectra[n].frobenius)),
        (Column("energy", "part of the adapter's ‖ΔW‖²"), lambda n: _share(one.shares[n], bar=True)),
        (Column("σ₁", "largest singular value"), lambda n: _number(spectra[n].spectral)),
        (Column("stable", "Σσ²/σ₁²"), lambda n: _fixed(spectra[n].stable_rank)),
        (Column("effective", "exp of the entropy of σ/Σσ"), lambda n: _fixed(spectra[n].effective_rank)),
        (Column("E90", "directions that hold 90 % of the energy"), lambda n: _rank(spectra[n].energy_rank(0.9))),
        (Column("E99", "directions that hold 99 % of the energy"), lambda n: _rank(spectra[n].energy_rank(0.99))),
    ]


def _beside(one: Subject) -> list[tuple[Column, Cellular]]:
    columns: list[tuple[Column, Cellular]] = []
    rows = whole_rank(one.beside.amplified) if one.beside else {}
    if rows:
        amplification = Column("amplification", "‖ΔW‖/‖UᵀWV‖")
        columns += [
            (amplification, lambda n: _number(rows[n].amplification if n in rows else None)),
            (Column("z", "of ‖UᵀWV‖², from random directions"), lambda n: _fixed(rows[n].z if n in rows else None)),
        ]
    found = one.beside.intruders if one.beside else None
    if found:
        columns.append((Column("intruders"), lambda n: _rank(found[n].count if n in found else None)))
    landings = one.landings
    if landings:
        columns += [
            (Column("‖ΔW‖/‖W‖"), lambda n: _share(landings[n].ratio if n in landings else None)),
            (
                Column("merge error", "predicted, as a share of ‖ΔW‖"),
                lambda n: _share(landings[n].rounding.error if n in landings else None),
            ),
        ]
    return columns


def _known(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


def _number(value: float | None) -> Entry:
    return Entry(number(value), _known(value))


def _fixed(value: float | None) -> Entry:
    return Entry(fixed(".2f")(value), _known(value))


def _rank(value: int | None) -> Entry:
    return Entry("" if value is None else str(value), value)


def _share(value: float | None, *, bar: bool = False) -> Entry:
    return Entry(percent(value), _known(value), _known(value) if bar else None)
