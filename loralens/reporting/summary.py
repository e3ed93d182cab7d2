"""What matters, in sentences; each only where it is true."""

from collections.abc import Sequence
from itertools import combinations
from math import isfinite, log

import numpy as np

from loralens.analysis.base.amplification import FAR, count_far
from loralens.analysis.checks.diagnosis import Diagnosis, by_cause
from loralens.analysis.compare.interference import LARGE
from loralens.analysis.groups import mean_effective_rank
from loralens.charts.amplification import whole_rank
from loralens.compression.curve import CurvePoint
from loralens.core.names import kind
from loralens.reporting.company import Company, Course
from loralens.reporting.ranks import advice
from loralens.reporting.run import sentence
from loralens.reporting.spectra import half
from loralens.reporting.subject import LOSS, Subject
from loralens.tables.numbers import count, fixed, listed, percent, size, span

signed = fixed("+.3f")


def sentences(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    company: Company | None,
    course: Course | None,
) -> list[str]:
    """The summary of a report: findings first, then each adapter, then what they are to each other."""
    several = len(subjects) > 1
    said = [_findings(findings)]
    if course:
        said.append(f"{len(course.order)} checkpoints of one run. {sentence(course)}")
    for one in subjects:
        own = [*_energy(one), *([] if course and one is not subjects[course.order[-1]] else _ranks(one)), *_base(one)]
        said += [f"{one.label}: {text}" for text in [" ".join(own)] if text] if several else own
    if company and not course:
        said += _together([one.label for one in subjects], company)
    return said


def _findings(findings: Sequence[Diagnosis]) -> str:
    causes = [same[0] for same in by_cause(findings)]
    serious = [one for one in causes if one.level != "note"]
    if not causes:
        return "The doctor found nothing wrong."
    if not serious:
        return f"The doctor found no error and nothing to warn of; {count(len(causes), 'note')} below."
    levels = [count(n, level) for level in ("error", "warning") if (n := sum(one.level == level for one in causes))]
    codes = list(dict.fromkeys(one.code for one in serious))
    return f"The doctor has {listed(levels)}: {listed(codes[:4])}{' and more' if len(codes) > 4 else ''}."


def _energy(one: Subject) -> list[str]:
    if not one.spectra:
        return ["Nothing could be measured: no module holds finite numbers."]
    if not one.norm:
        return [f"All of its {count(len(one.spectra), 'module')} are 0: it does nothing."]
    modules, fewest = len(one.spectra), half(one)
    zero = sum(spectrum.spectral == 0 for spectrum in one.spectra.values())
    text = f"{fewest} of {modules} modules hold half of the energy" if modules > 1 else "It adapts one module"
    shares: dict[str, float] = {}
    for name, share in one.shares.items():
        shares[kind(name)] = shares.get(kind(name), 0.0) + share
    top = max(shares, key=lambda name: shares[name])
    if 1 < len(shares) <= 40 and shares[top] > 1.5 / len(shares):
        text += f", and {top} alone {percent(shares[top])}"
    dead = f" {zero} of them {'is' if zero == 1 else 'are'} 0." if zero else ""
    nominal = span([spectrum.rank for spectrum in one.spectra.values()])
    mean = mean_effective_rank(one.spectra.values())
    return [f"{text}.{dead}", f"The effective rank is {mean:.1f} of {nominal} in the mean."]


def _ranks(one: Subject) -> list[str]:
    if one.plan is None or not one.norm:
        return []
    best, most = one.recommended, one.most
    said = advice(one)
    spared = _spared(one)
    if best and most and spared and spared.uniform.bytes < 0.95 * best.uniform.bytes:
        said += (
            f" Placed where they save most, directions worth {size(spared.budget.bytes)} are enough (ranks "
            f"{span(spared.budget.ranks)}, error {percent(spared.budget.error)}{' there' if one.on_data else ''})."
        )
    return [said]


def _spared(one: Subject) -> CurvePoint | None:
    """The smallest size at which ranks where they save most lose at most as much as is taken for nothing."""
    fitting = [point for point in one.points if point.budget.error**2 <= LOSS]
    return min(fitting, key=lambda point: point.rank, default=None)


def _base(one: Subject) -> list[str]:
    said = []
    rows = whole_rank(one.beside.amplified) if one.beside else {}
    if rows:
        far, expected = count_far(list(rows.values()))
        said.append(
            f"In {far} of {len(rows)} modules ΔW lies along directions in which the base is stronger or weaker than "
            f"random ones would find it (beyond {FAR:g} standard deviations, where chance gives {expected:.2g})."
        )
    found = one.beside.intruders if one.beside else None
    if found:
        looked, new = sum(x.s.size for x in found.values()), sum(x.count for x in found.values())
        said.append(f"{new} of the {looked} leading directions of W + ΔW are intruders.")
    landings = one.landings
    if landings:
        worst = max(landings, key=lambda name: landings[name].rounding.error)
        told = landings[worst]
        where = f"Merged into {told.dtype}"
        if told.rounding.error < 0.005:
            said.append(f"{where} it would arrive nearly as it is, {percent(told.rounding.error)} off at worst.")
        else:
            mean = float(np.median([x.rounding.error for x in landings.values()]))
            said.append(
                f"{where} it would be {percent(mean)} off in the median module and {percent(told.rounding.error)} in "
                f"the worst, {worst}."
            )
    return said


def _together(labels: Sequence[str], found: Company) -> list[str]:
    pairs = found.pairs
    said = [
        f"{listed([labels[t] for t in group])} began from one random A: compare them on the out side."
        for group in found.families
    ]
    known = {
        (s, t): float(pairs.cosine[s, t])
        for s, t in combinations(range(pairs.count), 2)
        if isfinite(pairs.cosine[s, t])
    }
    if known:
        s, t = max(known, key=lambda pair: abs(known[pair]))
        z = float(pairs.cosine_z[s, t])
        away = "more than 100" if abs(z) > 100 else f"{abs(z):.1f}"
        cosine = f"cosine {signed(known[s, t])}, {away} standard deviations from chance"
        if len(known) == 1:
            two = "The two updates" if len(labels) == 2 else f"The updates of {labels[s]} and {labels[t]}"
            said.append(f"{two} have a {cosine}{_verdict(known[s, t], z, len(known))}.")
        else:
            verdict = _verdict(known[s, t], z, len(known))
            said.append(f"Nearest to each other are {labels[s]} and {labels[t]}: {cosine}{verdict}.")
    if found.fights:
        one = found.fights[0]
        names = f"{labels[one.first]} and {labels[one.second]}"
        said.append(
            f"Where most is at stake {names} fight in {one.where}: cosine {signed(one.cosine)} over "
            f"{count(one.modules, 'module')}."
        )
    else:
        said.append(
            f"No two fight in any module: no cosine is below −{LARGE:g}, at which the sum of two of one length loses "
            f"{LARGE:.0%} of each, and beyond chance."
        )
    return said


def _verdict(cosine: float, z: float, pairs: int) -> str:
    """Of the largest |cosine| of so many pairs.

    |z| of two single directions exceeds t with probability e^−t at most, and of more directions less: beyond
    ln(20·pairs), which is 3 for one pair, chance leaves any pair in one case of 20.
    """
    if abs(z) < log(20 * pairs):
        return ", which is what unrelated adapters would have"
    return ": real, but small" if abs(cosine) < LARGE else ""
