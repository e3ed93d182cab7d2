"""Checks for a wrong strength: odd scales, joined or fused pairs with the α of one, and sums that tools got wrong."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise
from math import sqrt
from operator import itemgetter

import numpy as np

from loralens.analysis.diagnosis import Diagnosis, Examination, share
from loralens.analysis.every_pair import connected_groups, match_collection
from loralens.analysis.interacting_pairs import is_same
from loralens.analysis.merge_effect import update_entries
from loralens.analysis.readings import ModuleReading
from loralens.analysis.two_adapters import compare_subspaces
from loralens.choices import Level
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import sample_entries
from loralens.tables.numbers import number, whole_percent

# Largest scale that is used on purpose, with room: people choose α/r up to 32, and the default of mlx-lm is 20. Below
# it, the scale alone shows no fault. A module too strong for its kind is an outlier, and with --base it dominates W.
LARGEST = 64.0
SMALLEST = 1 / 64  # smallest usual scale: kohya's default α = 1 reaches it at r = 64

# Code → its level, whether a scale is suspicious, and what to do then. Small and negative scales are often meant: α = 1
# at a high rank is the default of kohya, and an adapter that is taken off again has a negative scale.
SUSPICIOUS: dict[str, tuple[Level, Callable[[float], bool], str]] = {
    "scale-zero": ("warning", lambda scale: scale == 0, "state α = r, or leave the modules out"),
    "scale-negative": ("note", lambda scale: scale < 0, "if it is not meant to be subtracted, negate it: `{negate}`"),
    "scale-large": (
        "warning",
        lambda scale: scale > LARGEST,
        "compare with the α and r of the training run; if it is wrong, put the run's value into the configuration",
    ),
    "scale-small": ("note", lambda scale: 0 < scale < SMALLEST, "compare with the α and r of the training run"),
}


def find_wrong_scales(exam: Examination) -> Iterator[Diagnosis]:
    """Report every suspicious scale, once for all modules that have it."""
    for code, (level, wrong, fix) in SUSPICIOUS.items():
        hit = [name for name, one in exam.readings.items() if wrong(one.module.scale)]
        if not hit:
            continue
        module = exam.readings[hit[0]].module
        of_modules = "" if len(hit) == len(exam.readings) else f": {some(hit)}"
        evidence = f"scale {module.scale:.4g}, {module.scaling}, in {share(len(hit), len(exam.readings))}{of_modules}"
        fix = fix.format(negate=exam.writes("negate", "negated"))
        yield Diagnosis(level, code, evidence, fix, hit[0] if len(hit) == 1 else None)
    yield from _scale_is_alpha(exam)


def _scale_is_alpha(exam: Examination) -> Iterator[Diagnosis]:
    parameters = exam.setting("lora_parameters")
    if exam.adapter.format != "mlx" or not isinstance(parameters, dict) or "alpha" not in parameters:
        return
    # At rank 1, α and α/r are the same number.
    rank = max((one.module.rank for one in exam.readings.values() if isinstance(one.module, LowRank)), default=1)
    if parameters.get("scale") == parameters["alpha"] and rank > 1:
        evidence = f"lora_parameters has scale {parameters['scale']} and the same alpha, at rank {rank}: α/r would be "
        evidence += f"{parameters['alpha'] / rank:.4g}"
        fix = "if it was trained with α/r, write that as lora_parameters.scale in adapter_config.json"
        yield Diagnosis("warning", "scale-is-alpha", evidence, fix)


APART = 1.3  # smallest ratio of the lengths of two neighbouring rows in different blocks
ALIKE = 1.15  # largest ratio within a block; over all rows of most published adapters it is 1.04 to 1.12
MOST = 0.9  # the share of the modules that must have blocks at the same rows
FEWEST = 4  # in fewer modules than this, equal blocks may be chance
SPARSE = 0.4  # with a smaller share of zeros B has no blocks, because even two blocks leave half of B zero


def find_joined_pairs(exam: Examination) -> Iterator[Diagnosis]:
    """Report blocks that the metadata, the lengths of the rows of A, or the zeros of B suggest."""
    counts = {name: _block_diagonal(one) for name, one in exam.pairs.items()}
    yield from _look_for_split(exam, counts)
    declared_rank = _number((exam.adapter.metadata or {}).get("ss_network_dim"))
    plain = [exam.pairs[name] for name, count in counts.items() if count == 1]
    # `scaling.rank` comes first, because an expanded LoHa has a larger rank than it was trained with.
    ranks = {reading.module.scaling.rank or reading.module.rank for reading in plain}
    # A scale of 1 or more is not too weak: the program that joined the adapters has raised α.
    if (
        declared_rank
        and len(ranks) == 1
        and (rank := ranks.pop()) > declared_rank
        and rank % declared_rank == 0
        and _scale(plain[0]) < 1
    ):
        evidence = f"ss_network_dim says {declared_rank:g}, the pairs have rank {rank}; scale {plain[0].module.scaling}"
        yield Diagnosis("warning", "concat-alpha", evidence, _stronger(rank / declared_rank))
        return  # the lengths of the rows would only say the same again
    blocks = row_length_blocks(plain)
    if blocks and _scale(plain[0]) < 1:
        evidence = (
            f"in at least {whole_percent(MOST)} of the modules the lengths of the rows of A form blocks of {blocks} "
            f"rows, as in adapters that were joined side by side; scale {plain[0].module.scaling}"
        )
        yield Diagnosis("warning", "concat-alpha", evidence, _stronger(sum(blocks) / blocks[0]))


def row_length_blocks(readings: Sequence[ModuleReading]) -> list[int]:
    """The sizes of blocks of rows of A with different lengths, if nearly all modules have the same; else empty.

    A trained A stays near its initialisation, whose rows are equally long. Two adapters side by side, with different
    weights or scales, therefore show as a step in the lengths.
    """
    if len(readings) < FEWEST:
        return []
    lengths = [one.A.lengths for one in readings if one.A]
    cuts = Counter(map(_cuts, lengths))
    # Blocks that come from joining adapters are at the same rows in all modules; chance gives each module its own.
    commonest, times = max(cuts.items(), key=itemgetter(1), default=((), 0))
    if not commonest or times < MOST * len(lengths):
        return []
    return [int(n) for n in np.diff(commonest)]


def _cuts(lengths: Array) -> tuple[int, ...]:
    """The first row of every block, and r; empty if there is only one block or the blocks are not clear."""
    if len(lengths) < 2 or not lengths.all():
        return ()
    steps = np.abs(np.diff(np.log(lengths)))
    # Between the two thresholds nothing is decided: the lengths there are neither one block nor clearly several.
    cuts = [0, *(np.flatnonzero(steps > np.log(APART)) + 1).tolist(), len(lengths)]
    parts = [lengths[a:b] for a, b in pairwise(cuts)]
    clear = all(part.max() <= ALIKE * part.min() and len(part) > 1 for part in parts)
    return tuple(cuts) if clear and len(parts) > 1 else ()


def _look_for_split(exam: Examination, counts: Mapping[str, int]) -> Iterator[Diagnosis]:
    by_count: dict[int, list[str]] = {}
    for name, count in counts.items():
        if count > 1 and 0 < _scale(exam.pairs[name]) <= 1 / count:
            by_count.setdefault(count, []).append(name)
    for count, names in by_count.items():
        module = exam.readings[names[0]].module
        evidence = (
            f"B is block-diagonal, {count} parts of rank {module.rank // count}, in "
            f"{share(len(names), len(exam.readings))}: {some(names)}; scale {module.scaling}"
        )
        yield Diagnosis("warning", "split-qkv-alpha", evidence, _stronger(count), names[0] if len(names) == 1 else None)


def _block_diagonal(reading: ModuleReading) -> int:
    """The number of diagonal blocks of B: of equal width and any height, with zeros outside; 1 for an ordinary B."""
    module, factor = reading.module, reading.B
    # A pair of kind "merged" is block-diagonal by its format, with the scale that belongs to it.
    if not factor or not isinstance(module, LowRank) or module.layout.kind == "merged" or factor.zeros < SPARSE:
        return 1
    nonzero = module.B != 0
    for count in range(module.rank // 2, 1, -1):  # most blocks first; every block has at least two columns
        if module.rank % count == 0 and _is_block_diagonal(nonzero, count):
            return count
    return 1


def _is_block_diagonal(nonzero: Array, count: int) -> bool:
    width = nonzero.shape[1] // count
    used = np.stack([nonzero[:, i * width : (i + 1) * width].any(axis=1) for i in range(count)])  # (count, out)
    first = [int(np.flatnonzero(rows)[0]) if rows.any() else -1 for rows in used]
    return bool((used.sum(axis=0) <= 1).all()) and min(first) >= 0 and first == sorted(first)


def _scale(reading: ModuleReading) -> float:
    """The scale α/r of a module whose file states α, else 1."""
    return (
        reading.module.scale if reading.module.scaling.stated and reading.module.scaling.formula == "alpha/r" else 1.0
    )


def _stronger(factor: float) -> str:
    return f"if so, use it at {factor:g} times the strength, or multiply its alphas by {factor:g}"


def _number(text: object) -> float | None:
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if value > 0 else None


ORTHOGONAL = 2e-3  # |cosine| up to which singular vectors count as orthogonal after rounding to float32 or float16
ORTHOGONAL_BF16 = 3e-2  # the same in bfloat16, which has three bits fewer than float16
FIXED = (0, 21, 2)  # the first version of PEFT that is known to be right; 0.19.1 was measured to scale twice
COMBINING_BUG_MOST = 0.9  # the share of the modules that must show the structure


def find_combining_bug(exam: Examination) -> Iterator[Diagnosis]:
    """Report at most one bug. The structure of the factors shows an SVD, and α = r shows that PEFT made the factors."""
    pairs = {name: one for name, one in exam.pairs.items() if one.module.rank > 1}
    alpha_is_rank = all(one.module.scaling.alpha == one.module.rank for one in pairs.values())
    if exam.adapter.format != "peft" or not pairs or not alpha_is_rank:
        return
    decomposed = sum(_is_svd(one) for one in pairs.values())
    rank = next(iter(pairs.values())).module.rank
    svd = decomposed >= COMBINING_BUG_MOST * len(pairs)
    cut = row_length_blocks(list(pairs.values()))
    # rsLoRA first: adapters joined side by side ("cat") are too strong by √r as well, and no SVD shows them.
    if exam.setting("use_rslora") and (svd or cut):
        how = f"the lengths of the rows of A form blocks of {cut} rows"
        if svd:
            how = f"{decomposed} of {len(pairs)} modules are singular vectors"
        evidence = (
            f"{how}, which training does not produce; α = r = {rank} with rsLoRA gives the scale √r = {sqrt(rank):.3g}"
        )
        fix = "set use_rslora to false in adapter_config.json, unless its numbers were made with it"
        yield Diagnosis("warning", "rslora-combined", evidence, fix)
    elif svd and _version(exam.setting("peft_version")) < FIXED:
        version = exam.setting("peft_version")
        evidence = (
            f"in {decomposed} of {len(pairs)} modules A is orthonormal and B orthogonal with falling columns, and α = r"
            f" = {rank}: the result of an SVD, as PEFT {version or '(version unknown)'} combines adapters"
        )
        fix = f"give its sources too, to find their weights: `{exam.command('doctor', 'SOURCE…')}`"
        yield Diagnosis("warning", "svd-combined", evidence, fix)


def _is_svd(reading: ModuleReading) -> bool:
    """Whether the rows of A are orthonormal and the columns of B orthogonal, with decreasing lengths."""
    A, B = reading.A, reading.B
    assert A
    assert B
    # PEFT stores U·S as B and Vᵀ as A: unit rows of A, and columns of B as long as the singular values, which fall.
    limit = ORTHOGONAL_BF16 if reading.module.dtype.name == "bfloat16" else ORTHOGONAL
    unit = np.abs(A.lengths[A.lengths > 0] - 1).max(initial=0.0) < limit
    falling = bool((np.diff(B.lengths) <= limit * B.lengths[0]).all())
    return bool(unit) and A.skew < limit and B.skew < limit and falling


def _version(text: object) -> tuple[int, ...]:
    """The numbers of a version, of ``0.19.2.dev0@1a2b3c`` too; () if there is none, which counts as an old one."""
    parts = str(text or "").split("@")[0].split(".")
    return tuple(int(part) for part in parts[:3] if part.isdecimal())


# A linear relation of updates holds for any of their entries; those of dozens of modules are thousands of equations.
ENTRIES = 256  # entries of every module that are compared
RESIDUAL = 0.01  # the share of ‖ΔW‖ that a sum may leave unexplained; storage in bfloat16 leaves 0.4 %
SAME = 0.02  # relative distance of a total weight from the factor of a known bug
PLAIN = 0.1  # a factor that differs from 1 by less does not indicate a bug
SAME_ADAPTER = "practically the same adapter"  # how the evidence about such a pair begins
CANDIDATE = 0.9  # cosine of entries from which the cosine of the whole updates is measured
SMALL = 0.01  # a source that contributes a smaller share of ‖ΔW‖ is left out

Sources = dict[int, float]


def find_weighted_sums(exams: Sequence[Examination]) -> Iterator[Diagnosis]:
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
