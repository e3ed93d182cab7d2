"""The summary of a report: the sentences that stand at the top of the page, each only where it is true."""

from collections.abc import Sequence
from math import log
from statistics import median

from loralens.analysis.amplification import FAR, count_far
from loralens.analysis.diagnosis import Diagnosis, by_cause
from loralens.analysis.interference import FIGHT, LARGE, SAME, in_words
from loralens.analysis.spectrum import by_kind, mean_effective_rank
from loralens.charts.amplification import full_rank_rows
from loralens.compression.plan import recommended_point
from loralens.reporting.base import error_in_words
from loralens.reporting.collection import CheckpointRun, Collection, finite_cosines
from loralens.reporting.ranks import advice
from loralens.reporting.run import run_sentence
from loralens.reporting.spectra import half_energy_modules
from loralens.reporting.subject import Subject
from loralens.tables.numbers import count, join_words, number, percent, signed, size, span, whole_percent

# If the largest error of a merge in any module is below this, the summary says that the merge preserves ΔW.
FAITHFUL = 0.005
# A kind is named if its share of the energy is more than 1.5 times an even share. With more than 40 kinds none is
# named: every module may then be a kind of its own, and the share of one module says nothing.
UNEVEN, KINDS = 1.5, 40
WORTH = 0.95  # a second recommendation is worth a sentence only where it saves at least 5 % of the file of the first
BEYOND = 100  # standard deviations above which the exact number gives no further information
FELT = 0.05  # modules with a conflict contribute at least this much to the cosine of the whole updates
CODES = 4  # codes of findings that the sentence lists: the section below has all of them


def summary_sentences(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    collection: Collection | None,
    run: CheckpointRun | None,
) -> list[str]:
    """The summary of a report: findings first, then each adapter, then what they are to each other."""
    several = len(subjects) > 1
    lines = [_findings(findings)]
    if run:
        lines.append(f"{len(run.order)} checkpoints of one run. {run_sentence(run)}")
    for subject in subjects:
        # In a run only the last checkpoint gets a recommendation, because the others are intermediate results.
        ranks = [] if run and subject is not subjects[run.order[-1]] else _ranks(subject)
        sentences = [*_energy(subject), *ranks, *_base(subject)]
        lines += [f"{subject.label}: {' '.join(sentences)}"] if several else sentences
    # Checkpoints of one run always resemble each other, so this is not reported.
    if collection and not run:
        lines += _together([subject.label for subject in subjects], collection)
    return lines


def remarks(subjects: Sequence[Subject]) -> list[str]:
    """The sentences that a page shows below its first table.

    A page of several adapters has none: its tables compare their measurements, and one paragraph for each adapter
    would repeat the same words.
    """
    return [*_energy(subjects[0]), *_base(subjects[0])] if len(subjects) == 1 else []


def _findings(findings: Sequence[Diagnosis]) -> str:
    causes = [same[0] for same in by_cause(findings)]
    serious = [finding for finding in causes if finding.level != "note"]
    if not causes:
        return "The doctor found nothing wrong."
    if not serious:
        return f"The doctor found no errors and no warnings; {count(len(causes), 'note')} below."
    # Notes are not counted where there are errors or warnings, as a note asks for nothing to be done.
    levels = [
        count(n, level) for level in ("error", "warning") if (n := sum(finding.level == level for finding in causes))
    ]
    codes = list(dict.fromkeys(finding.code for finding in serious))
    unlisted = " and more" if len(codes) > CODES else ""
    return f"The doctor has {join_words(levels)}: {join_words(codes[:CODES])}{unlisted}."


def _energy(subject: Subject) -> list[str]:
    if not subject.spectra:
        return ["Nothing could be measured: every module holds NaN or Inf."]
    if not subject.norm:
        return [f"ΔW is 0 in all of its modules ({len(subject.spectra)}): the adapter does nothing."]
    modules, fewest = len(subject.spectra), half_energy_modules(subject)
    zero = sum(spectrum.spectral == 0 for spectrum in subject.spectra.values())
    text = f"{fewest} of {modules} modules hold half of the energy" if modules > 1 else "The adapter has one module"
    groups = by_kind(subject.spectra)
    top = max(groups, key=lambda group: group.share)
    if 1 < len(groups) <= KINDS and top.share > UNEVEN / len(groups):
        text += f", and {top.name} alone holds {percent(top.share)}"
    dead = f" In {count(zero, 'module')} ΔW is 0." if zero else ""
    nominal = span([spectrum.rank for spectrum in subject.spectra.values()])
    mean = mean_effective_rank(subject.spectra.values())
    return [f"{text}.{dead}", f"The mean effective rank is {mean:.1f} at a nominal rank of {nominal}."]


def _ranks(subject: Subject) -> list[str]:
    if subject.plan is None or not subject.norm:
        return []
    best, text = subject.recommended, advice(subject)
    by_module = recommended_point(subject.points, budget=True)
    if best and by_module and by_module.uniform.bytes < WORTH * best.uniform.bytes:
        on_inputs = " on the inputs given" if subject.on_data else ""
        text += (
            f" With a rank of its own for every module, {size(by_module.budget.bytes)} are enough (ranks "
            f"{span(by_module.budget.ranks)}, error {percent(by_module.budget.error)}{on_inputs})."
        )
    return [text]


def _base(subject: Subject) -> list[str]:
    sentences: list[str] = []
    rows = full_rank_rows(subject.against_base.amplified)
    if rows:
        far, expected = count_far(list(rows.values()))
        sentences.append(
            f"In {far} of {len(rows)} modules the base weight is stronger or weaker along the directions of ΔW than "
            f"along random directions, by more than {FAR:g} standard deviations. Chance alone would give "
            f"{expected:.2g} such modules."
        )
    looked, intruders = subject.against_base.intruder_counts
    if looked:
        sentences.append(
            f"{intruders} of the {looked} leading directions of W + ΔW are intruder dimensions: they resemble no "
            "singular direction of W."
        )
    effects = subject.merge_effects
    if effects:
        worst = subject.worst_merge
        merge, largest = f"A merge into {effects[worst].dtype} weights", effects[worst].rounding.error
        if largest < FAITHFUL:
            error = error_in_words(largest)
            sentences.append(f"{merge} would preserve ΔW: its largest error in any module is {error}.")
        else:
            # The median is given too, because the worst of many modules may be an exception.
            middle = median(x.rounding.error for x in effects.values())
            sentences.append(
                f"{merge} would have an error of {percent(middle)} of ‖ΔW‖ in the median module and of "
                f"{percent(largest)} in the worst, {worst}."
            )
    return sentences


def _together(labels: Sequence[str], collection: Collection) -> list[str]:
    pairs = collection.pairs
    sentences = [
        f"{join_words([labels[t] for t in group])} were initialised with the same random A, so compare them by φ "
        "of the out side."
        for group in collection.families
    ]
    cosines = finite_cosines(pairs)
    if cosines:
        s, t = max(cosines, key=lambda pair: abs(cosines[pair]))
        z = float(pairs.cosine_z[s, t])
        away = f"more than {BEYOND}" if abs(z) > BEYOND else f"{abs(z):.1f}"
        cosine = f"cosine {signed(cosines[s, t])}, {away} standard deviations from chance"
        verdict = _verdict(cosines[s, t], z, len(cosines))
        if len(cosines) > 1:
            pair = f"The largest |cosine| of two adapters is that of {labels[s]} and {labels[t]}:"
        else:
            updates = "The two updates" if len(labels) == 2 else f"The updates of {labels[s]} and {labels[t]}"
            pair = f"{updates} have a"
        sentences.append(f"{pair} {cosine}{verdict}.")
    if collection.conflicts:
        conflict = collection.conflicts[0]
        names = f"{labels[conflict.first]} and {labels[conflict.second]}"
        place = f"in {conflict.location}: cosine {signed(conflict.cosine)} over {count(conflict.modules, 'module')}"
        # It is called a conflict only if it has a noticeable effect: a module with little energy may have any cosine.
        if conflict.cosine <= FIGHT and abs(conflict.weight) >= FELT:
            sentences.append(f"The conflict with the largest effect is between {names} {place}.")
        else:
            effect = f"This contributes {number(conflict.weight, 2)} to the cosine of the whole updates"
            sentences.append(f"{names} partly work against each other {place}. {effect}.")
    else:
        sentences.append(
            f"No two adapters work against each other in any module: no cosine is both {number(-LARGE)} or less and "
            f"beyond chance. At {number(-LARGE)} the sum of two updates of equal norm loses {whole_percent(LARGE)} of "
            "each."
        )
    return sentences


def _verdict(cosine: float, z: float, pairs: int) -> str:
    """Whether the largest |cosine| of so many pairs is more than chance would give, and whether it is nearly 1."""
    # Between two updates of rank 1, |z| exceeds t by chance with a probability of at most e^−t. With more directions
    # the probability is lower. So the probability that any of the pairs exceeds ln(20·pairs) is at most 1/20. For one
    # pair this limit is 3.
    if abs(z) < log(20 * pairs):
        return ", which is what unrelated adapters would have"
    if abs(cosine) >= SAME:
        return f": they {in_words(cosine, z)}"
    return ": real, but small" if abs(cosine) < LARGE else ""
