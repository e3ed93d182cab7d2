"""Adapters that are combinations of others, and the strengths they were combined at."""

from collections.abc import Iterator, Sequence
from math import sqrt

import numpy as np

from loralens.analysis.checks.base import update_entries
from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient
from loralens.analysis.compare.pairwise import aligned, groups
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import sample_entries

RULES = {
    "combination": "The adapter is a weighted sum of others that were given.",
    "combination-scale": "The adapter is a weighted sum of others, with a factor that known bugs leave: "
    "α/r applied twice (PEFT svd, 0.8 to 0.19.1 at least), √r too strong (PEFT with rsLoRA), or the α of the first "
    "source at the summed rank (sd-scripts --concat).",
}
ENTRIES = 256  # of every module: a linear relation of the updates is one of any of their entries
RESIDUAL = 0.01  # of ‖ΔW‖ that the sum may leave unexplained: storage in bfloat16 leaves 0.4 %
SAME = 0.02  # relative, of a total weight and the factor of a known bug
PLAIN = 0.1  # a factor this near to 1 is none
SMALL = 0.01  # of ‖ΔW‖: a source with less is none

Sources = dict[int, float]


def look(patients: Sequence[Patient]) -> Iterator[Diagnosis]:
    """One diagnosis for every adapter that is a multiple of another, or a positive sum of others.

    Relations are sought in some entries of ΔW, in modules that all of a family have: cheap, blind to rank and gauge.
    """
    for members in _kin(patients):
        yield from _among([patients[t] for t in members])


def _kin(patients: Sequence[Patient]) -> list[list[int]]:
    """Groups of adapters that have modules in common: only those can be sums of each other."""
    shared = np.zeros((len(patients), len(patients)))
    for module in aligned([one.adapter for one in patients]):
        holders = [t for t, name in enumerate(module.holders) if name]
        shared[np.ix_(holders, holders)] = 1
    return [group for group in groups(shared) if len(group) > 1]


def _among(patients: Sequence[Patient]) -> Iterator[Diagnosis]:
    modules = [one for one in aligned([p.adapter for p in patients]) if all(map(_readable, patients, one.holders))]
    if not modules:
        return
    X = np.stack([_sketch(one, [module.holders[t] for module in modules]) for t, one in enumerate(patients)])
    distinct: list[int] = []  # those that are multiples of no earlier one
    for t in np.flatnonzero(X.any(axis=1)).tolist():
        twin = next((i for i in distinct if _residual(X, t, [i])[1] < RESIDUAL), None)
        if twin is None:
            distinct.append(t)
        else:
            yield _of_two(patients, X, t, twin)
    for t in distinct:
        sources = _sources(X, t, [i for i in distinct if i != t])
        if sources:
            yield _say(patients, t, sources)


def _readable(patient: Patient, name: str | None) -> bool:
    reading = patient.readings.get(name) if name else None
    return reading is not None and reading.spectrum is not None


def _sketch(patient: Patient, names: Sequence[str | None]) -> Floats:
    """The same entries of the ΔW of every module, one after the other."""
    parts = []
    for name in names:
        assert name
        module = patient.readings[name].module
        parts.append(update_entries(module, *sample_entries(module.shape, count=ENTRIES)))
    return np.concatenate(parts)


def _residual(X: Floats, t: int, sources: Sequence[int]) -> tuple[Floats, float]:
    """Weights of the others that come nearest to row t, and what they leave of it, relative."""
    weights = np.linalg.lstsq(X[sources].T, X[t], rcond=None)[0]
    unexplained = np.linalg.norm(X[t] - weights @ X[sources]) / np.linalg.norm(X[t])
    return np.asarray(weights, dtype=np.float64), float(unexplained)


def _sources(X: Floats, t: int, candidates: Sequence[int]) -> Sources:
    """The others that row t is a positive sum of; empty where it is none."""
    if len(candidates) < 2 or X.shape[1] < 10 * len(candidates):
        return {}
    weights, unexplained = _residual(X, t, candidates)
    parts = weights * np.linalg.norm(X[candidates], axis=1) / np.linalg.norm(X[t])
    if unexplained > RESIDUAL or parts.min() < -SMALL:
        return {}
    return {i: float(w) for i, w, part in zip(candidates, weights, parts, strict=True) if part > SMALL}


def _of_two(patients: Sequence[Patient], X: Floats, t: int, twin: int) -> Diagnosis:
    """Said of whichever of two carries a factor of a known bug against the other."""
    factor = float(_residual(X, t, [twin])[0][0])
    forward, backward = (t, {twin: factor}), (twin, {t: 1 / factor})
    subject, sources = backward if _bug(patients, *backward) and not _bug(patients, *forward) else forward
    return _say(patients, subject, sources)


def _say(patients: Sequence[Patient], t: int, sources: Sources) -> Diagnosis:
    subject = patients[t]
    terms = " + ".join(f"{weight:.4g} × {patients[i].path}" for i, weight in sources.items())
    bug = _bug(patients, t, sources)
    if bug:
        why, factor = bug
        fix = f"if so, use it at {1 / factor:.4g} of the strength, or combine the sources again"
        return Diagnosis("warning", "combination-scale", f"ΔW = {terms}: {why}", fix, adapter=subject.path)
    twin = patients[next(iter(sources))]
    fix = f"two names for one update: {subject.command('equal', twin.quoted)}"
    same = len(sources) == 1 and abs(next(iter(sources.values())) - 1) < RESIDUAL
    return Diagnosis("note", "combination", f"ΔW = {terms}", fix if same else "", adapter=subject.path)


def _bug(patients: Sequence[Patient], t: int, sources: Sources) -> tuple[str, float] | None:
    """Which known bug leaves such weights, in words, and by what they are too large."""
    total, subject = sum(sources.values()), patients[t]
    scales = {abs(scale) for i in sources for scale in _scales(patients[i])}
    ranks = [_rank(patients[i]) for i in sources]
    if len(scales) == 1 and _is(total, scale := scales.pop()):
        return f"the weights sum to {total:.4g}, the scale of the sources, as if it was applied twice", scale
    if subject.setting("use_rslora") and _is(total, root := sqrt(_rank(subject))):
        return f"the weights sum to {total:.4g} = √r, as PEFT leaves them under rsLoRA", root
    part = ranks[0] / _rank(subject)
    if len(sources) > 1 and _rank(subject) == sum(ranks) and all(_is(weight, part) for weight in sources.values()):
        return f"every weight is {part:.4g} = r₁/Σr, as α of the first source at the summed rank gives", part
    return None


def _is(value: float, factor: float) -> bool:
    return abs(factor - 1) > PLAIN and abs(value / factor - 1) < SAME


def _scales(patient: Patient) -> set[float]:
    return {reading.module.scale for reading in patient.readings.values()} - {0.0} or {1.0}


def _rank(patient: Patient) -> int:
    return max(reading.module.rank for reading in patient.readings.values())
