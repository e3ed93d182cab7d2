"""Adapters that are weighted sums of others, and the weights of these sums."""

from collections.abc import Iterator, Sequence
from itertools import combinations
from math import sqrt

import numpy as np

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.checks.merge_effect import update_entries
from loralens.analysis.compare.alikeness import is_same
from loralens.analysis.compare.clusters import connected_groups
from loralens.analysis.compare.pairwise import match_collection
from loralens.analysis.compare.similarity import compare_subspaces
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import sample_entries
from loralens.tables.numbers import number

CODES = {
    "near-copy": "Two adapters have nearly the same update, up to its strength: checkpoints of one run, or one adapter "
    "that was saved twice with a change.",
    "combination": "The adapter is a weighted sum of others that were given.",
    "combination-scale": "The adapter is a weighted sum of others, with a factor that known bugs leave: "
    "α/r applied twice (PEFT svd, 0.8 to 0.19.1 at least), √r too strong (PEFT with rsLoRA), or the α of the first "
    "source at the summed rank (sd-scripts --concat).",
}
# A linear relation of updates holds for any of their entries; those of dozens of modules are thousands of equations.
ENTRIES = 256  # entries of every module that are compared
RESIDUAL = 0.01  # the share of ‖ΔW‖ that a sum may leave unexplained; storage in bfloat16 leaves 0.4 %
SAME = 0.02  # relative distance of a total weight from the factor of a known bug
PLAIN = 0.1  # a factor that differs from 1 by less does not indicate a bug
SAME_ADAPTER = "practically the same adapter"  # how the evidence about such a pair begins
CANDIDATE = 0.9  # cosine of entries from which the cosine of the whole updates is measured
SMALL = 0.01  # a source that contributes a smaller share of ‖ΔW‖ is left out

Sources = dict[int, float]


def look(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    """Report every adapter that is a multiple of another, or a positive sum of others.

    Relations are sought between some entries of ΔW, in modules that all adapters of a group have. That is cheap, and
    independent of rank and gauge.
    """
    for members in _related_groups(exams):
        yield from _find_sums([exams[t] for t in members])


def _related_groups(exams: Sequence[Examination]) -> list[list[int]]:
    """Groups of adapters that have modules in common: only those can be sums of each other."""
    shared = np.zeros((len(exams), len(exams)))
    for module in match_collection([one.adapter for one in exams]):
        holders = [t for t, name in enumerate(module.holders) if name]
        shared[np.ix_(holders, holders)] = 1
    return [group for group in connected_groups(shared) if len(group) > 1]


def _find_sums(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
    spectra = [exam.spectra for exam in exams]  # they have the modules without NaN and Inf
    modules = [
        module
        for module in match_collection([exam.adapter for exam in exams])
        if all(name in known for name, known in zip(module.holders, spectra, strict=True))
    ]
    if not modules:
        return
    X = np.stack([_sketch(exam, [str(module.holders[t]) for module in modules]) for t, exam in enumerate(exams)])
    distinct: list[int] = []  # adapters that are not a multiple of an earlier one
    for t in np.flatnonzero(X.any(axis=1)).tolist():  # an adapter that is 0 is an empty sum, which is not reported
        twin = next((i for i in distinct if _residual(X, t, [i])[1] < RESIDUAL), None)
        if twin is None:
            distinct.append(t)
            continue
        # Each of the two is a multiple of the other. The one with the factor of a known bug was made from the other.
        factor = float(_residual(X, t, [twin])[0][0])
        forward, backward = (t, {twin: factor}), (twin, {t: 1 / factor})
        yield _diagnose(exams, *(backward if _bug(exams, *backward) and not _bug(exams, *forward) else forward))
    yield from _find_near_copies(exams, X, distinct)
    for t in distinct:
        if sources := _sources(X, t, [i for i in distinct if i != t]):
            yield _diagnose(exams, t, sources)


def _find_near_copies(exams: Sequence[Examination], X: Floats, distinct: Sequence[int]) -> Iterator[Diagnosis]:
    """Report the pairs that are not multiples of each other, but are practically the same adapter."""
    rows = X / np.linalg.norm(X, axis=1, keepdims=True).clip(min=np.finfo(float).tiny)
    for i, t in combinations(distinct, 2):
        # The entries only choose the pairs: their cosine weighs small modules as much as large ones.
        if rows[i] @ rows[t] < CANDIDATE:
            continue
        first, second = exams[i], exams[t]
        names = [name for name in second.spectra if name in second.adapter]
        cosine = compare_subspaces(second.adapter, first.adapter, modules=names).cosine
        if is_same(cosine):
            evidence = f"{SAME_ADAPTER} as {first.path}: cosine {cosine:.3f} of the updates"
            yield Diagnosis("note", "near-copy", evidence, _differences(second, first), adapter=second.path)


def _differences(second: Examination, first: Examination) -> str:
    return f"to see where they differ: `{second.command('similarity', first.quoted)}`"


def _sketch(exam: Examination, names: Sequence[str]) -> Floats:
    """Entries of the ΔW of every module, at the same places for every adapter, as one vector."""
    modules = [exam.readings[name].module for name in names]
    return np.concatenate([update_entries(one, *sample_entries(one.shape, count=ENTRIES)) for one in modules])


def _residual(X: Floats, t: int, sources: Sequence[int]) -> tuple[Floats, float]:
    """The least-squares weights of the ``sources`` for row t, and the relative residual."""
    weights = np.linalg.lstsq(X[sources].T, X[t], rcond=None)[0]
    unexplained = np.linalg.norm(X[t] - weights @ X[sources]) / np.linalg.norm(X[t])
    return np.asarray(weights, dtype=np.float64), float(unexplained)


def _sources(X: Floats, t: int, candidates: Sequence[int]) -> Sources:
    """The candidates of which row t is a positive sum, with their weights; empty if it is not such a sum."""
    # With too few entries for each unknown weight, some weights fit by chance.
    if len(candidates) < 2 or X.shape[1] < 10 * len(candidates):
        return {}
    weights, unexplained = _residual(X, t, candidates)
    # Each source is judged by its length in the sum and not by its weight, which depends on its own norm.
    parts = weights * np.linalg.norm(X[candidates], axis=1) / np.linalg.norm(X[t])
    if unexplained > RESIDUAL or parts.min() < -SMALL:
        return {}
    return {i: float(w) for i, w, part in zip(candidates, weights, parts, strict=True) if part > SMALL}


def _diagnose(exams: Sequence[Examination], t: int, sources: Sources) -> Diagnosis:
    subject = exams[t]
    terms = " + ".join(f"{number(weight)} × {exams[i].path}" for i, weight in sources.items())
    if bug := _bug(exams, t, sources):
        why, factor = bug
        fix = f"if so, use it at {1 / factor:.4g} of the strength, or combine the sources again"
        return Diagnosis("warning", "combination-scale", f"ΔW = {terms}: {why}", fix, adapter=subject.path)
    twin = exams[next(iter(sources))]
    same = len(sources) == 1 and abs(next(iter(sources.values())) - 1) < RESIDUAL
    evidence = f"{SAME_ADAPTER} as {twin.path}: ΔW = {terms}" if same else f"ΔW = {terms}"
    return Diagnosis("note", "combination", evidence, _differences(subject, twin) if same else "", adapter=subject.path)


def _bug(exams: Sequence[Examination], t: int, sources: Sources) -> tuple[str, float] | None:
    """The known bug that explains such weights, in words, and the factor by which they are too large."""
    # The weights that the user gave are unknown. Weights that sum to 1 are usual, so another sum is a sign of a bug.
    total, subject = sum(sources.values()), exams[t]
    scales = {abs(scale) for i in sources for scale in _scales(exams[i])}
    ranks = [_rank(exams[i]) for i in sources]
    if len(scales) == 1 and _is_near(total, scale := scales.pop()):
        return f"the weights sum to {total:.4g}, the scale of the sources, as if it was applied twice", scale
    if subject.setting("use_rslora") and _is_near(total, root := sqrt(_rank(subject))):
        return f"the weights sum to {total:.4g} = √r, as PEFT leaves them under rsLoRA", root
    # With one source the adapter is a multiple of it, and the ranks show nothing.
    part = ranks[0] / _rank(subject)
    if len(sources) > 1 and _rank(subject) == sum(ranks) and all(_is_near(weight, part) for weight in sources.values()):
        return f"every weight is {part:.4g} = r₁/Σr, as α of the first source at the summed rank gives", part
    return None


def _is_near(value: float, factor: float) -> bool:
    return abs(factor - 1) > PLAIN and abs(value / factor - 1) < SAME


def _scales(exam: Examination) -> set[float]:
    # A scale of 0 is that of a module that was switched off.
    return {reading.module.scale for reading in exam.readings.values()} - {0.0} or {1.0}


def _rank(exam: Examination) -> int:
    return max(reading.module.rank for reading in exam.readings.values())
