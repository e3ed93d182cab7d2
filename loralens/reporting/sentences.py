"""What a report says in sentences: the headline, the table of verdicts, and the summary, each only where it is true."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import PurePath
from statistics import median
from typing import NamedTuple

from loralens.analysis.amplification import FAR, count_far
from loralens.analysis.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.doctor import diagnosis_codes
from loralens.analysis.interacting_pairs import in_words
from loralens.analysis.learning_checks import ENERGY_KEPT
from loralens.analysis.loading_checks import CLIENT
from loralens.analysis.spectrum import by_kind, mean_effective_rank
from loralens.analysis.trajectory import SETTLED
from loralens.charts.amplification_charts import full_rank_rows
from loralens.charts.module_grid import fit_name
from loralens.core.base_model import image_models_of
from loralens.core.messages import quote_word
from loralens.formats.records.results import MeasuredAdapter, StoredEvaluation
from loralens.formats.records.training_notes import TrainingNotes
from loralens.reporting.adapter_sections import (
    LONG,
    advice,
    compress_command,
    error_in_words,
    half_energy_modules,
    quantity,
)
from loralens.reporting.subject import CheckpointRun, Collection, Subject
from loralens.tables.numbers import (
    UNDEFINED,
    count,
    fixed,
    join_words,
    number,
    percent,
    signed,
    span,
    whole_percent,
)
from loralens.tables.table import Column, Table

WORTHWHILE = 0.05  # if less than this share of the file would be saved, a smaller file is not worth writing
NAMED_FAULTS = 2  # kinds of findings that a verdict names
# If the largest error of a merge in any module is below this, the summary says that the merge preserves ΔW.
FAITHFUL = 0.005
# A kind is named if its share of the energy is more than 1.5 times an even share. With more than 40 kinds none is
# named: every module may then be a kind of its own, and the share of one module says nothing.
UNEVEN, KINDS = 1.5, 40
# If the A of the first checkpoint and that of the last have at least this cosine, φ of the in side shows the common
# initialisation and not the training. `loralens trajectory` has the same limit.
STUCK = 0.9
# A sentence names the first of these measures that was measured, as people know accuracy best, with so many adapters.
MEASURES = {"classification": ("accuracy", "loss"), "causal-lm": ("perplexity", "loss")}
NAMED = 4


class Verdict(NamedTuple):
    """One row of the table on the first screen: an adapter, the words about it, and what follows from its ranks.

    ``needed`` of ``of`` is the lowest rank for all modules that keeps 99 % of the energy. ``saved`` is the share of the
    file that ``command`` saves: it keeps as much with a rank for each module, or has the rank for all of them if the
    ranks are chosen for inputs. They are None or empty where there is none. ``levels`` counts the findings with
    different causes.
    """

    subject: Subject
    words: str
    needed: int | None
    of: int | None
    saved: float | None
    levels: Mapping[str, int]
    command: str = ""
    by_energy: bool = False


def verdict_of(subject: Subject, findings: Sequence[Diagnosis]) -> Verdict:
    """Return the row of one adapter; ``findings`` has those of all adapters."""
    own = [same[0] for same in by_cause(findings) if same[0].adapter == subject.path]
    levels = Counter(finding.level for finding in own)
    best, highest = (subject.recommended, subject.highest) if subject.norm else (None, None)
    # The same number as the doctor's. It knows no ranks that are chosen for inputs.
    exam = subject.examination
    saved = exam.saving(exam, ENERGY_KEPT) if best and exam.saving and not subject.on_data else None
    by_energy, command = saved is not None, exam.compress("small", f"--energy {ENERGY_KEPT}")
    if best and not by_energy:
        # Never below 0: because of its header, a file of lower rank may be larger, and then nothing is saved.
        saved = max(0.0, 1 - best.uniform.bytes / subject.bytes_before)
        command = f"{compress_command(subject)} --rank {best.rank}"
    words = "in order"
    if not subject.norm:
        words = "does nothing: ΔW is 0"
    elif saved is not None:
        words += ", larger than it needs to be" if saved >= WORTHWHILE else ", needs its size"
    # The most serious fact comes first.
    for level, what in (("warning", "look at it first"), ("error", "does not work as it is")):
        causes = {same[0].code: same for same in reversed(by_cause(findings)) if same[0].level == level}
        faults = [_in_words(same, subject) for same in reversed(causes.values()) if same[0].adapter == subject.path]
        if faults:
            tail = f"; and {len(faults) - NAMED_FAULTS} more" if len(faults) > NAMED_FAULTS else ""
            words = f"{what}: {'; '.join(faults[:NAMED_FAULTS])}{tail}"
    needed, of = best.rank if best else None, highest.rank if highest else None
    counts: dict[str, int] = {level: levels[level] for level in LEVELS}
    return Verdict(subject, words, needed, of, saved, counts, command, by_energy)


def _in_words(same: Sequence[Diagnosis], subject: Subject) -> str:
    """What findings of one cause mean, as a clause: the beginning of their explanation, and how many modules it is."""
    code = same[0].code
    # What a program does with this adapter says more than what the code means.
    about = same[0].evidence.partition(": ")[2] if code == CLIENT else diagnosis_codes().get(code, code)
    text = re.split(r"[.:;] | \(|, (?:and )?so |, which |, whose |, although |\.$", about)[0]
    text = text if code == CLIENT or text[:1] in "Bα‖" or text[1:2].isupper() else text[:1].lower() + text[1:]
    modules, of = len({finding.module for finding in same if finding.module}), len(subject.examination.readings)
    return f"{text} (in {modules} of {of} modules)" if modules else text


def answers_of(
    verdicts: Sequence[Verdict],
    findings: Sequence[Diagnosis],
    collection: Collection | None,
    run: CheckpointRun | None,
    base: str | None,
) -> list[tuple[str, str]]:
    """The three questions of every reader with their answers: in order or not, what it is and changes, what to do."""
    several = len(verdicts) > 1
    bad = [verdict for verdict in verdicts if not verdict.words.startswith("in order")]
    named = [
        f"{verdict.subject.label} ({verdict.words.removeprefix('look at it first: ')})" if several else verdict.words
        for verdict in bad[:NAMED]
    ]
    more = f"; and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    broken = any(verdict.levels["error"] or not verdict.subject.norm for verdict in bad)
    fine = "nothing in them looks wrong" if several else "nothing in it looks wrong"
    verdict = f"No{':' if several else ', it'}" if broken else f"Perhaps not{':' if several else ','}"
    order = f"{verdict} {'; '.join(named)}{more}." if bad else f"Yes: {fine}."
    if several:
        ranks = span([module.rank for verdict in verdicts for module in verdict.subject.adapter.modules.values()])
        bases = list(dict.fromkeys(_model_of(verdict.subject) for verdict in verdicts))
        models = join_words(bases[:NAMED]) if len(bases) <= NAMED else f"{len(bases)} bases"
        what = f"{len(verdicts)} adapters of rank {ranks}, for {models}: {headline(verdicts, collection, run)}"
    else:
        what = _what_it_is(verdicts[0].subject)
    questions = ("Are they OK?", "What are they?") if several else ("Is it OK?", "What is it?")
    return [(questions[0], order), (questions[1], what), ("What next?", _next_step(verdicts, findings, base))]


def _what_it_is(subject: Subject) -> str:
    """For which model an adapter is, what calls it, and how much it changes."""
    adapter = subject.examination.adapter
    modules = adapter.modules.values()
    ranks = span([module.rank for module in modules])
    text = f"A {adapter.format} adapter of rank {ranks} in {count(len(modules), 'module')}, for {_model_of(subject)}. "
    notes = TrainingNotes.of(adapter.metadata)
    if notes and notes.trigger_words:
        text += f"Trigger words: {', '.join(notes.trigger_words[:NAMED])}. "
    if subject.strength is not None:
        return f"{text}It changes the weights of the base by {percent(subject.strength)} (‖ΔW‖/‖W‖)."
    return f"{text}‖ΔW‖ is {number(subject.norm)}; with --base this page says how much of the weights that is."


def _model_of(subject: Subject) -> str:
    """The base that an adapter names, and the family of image models to which its modules belong."""
    adapter = subject.examination.adapter
    family = " or ".join(model.name for model in image_models_of(adapter))
    base = adapter.base_model and fit_name(adapter.base_model, LONG)
    return f"{base} ({family})" if base and family else base or family or "a base that it does not name"


def _next_step(verdicts: Sequence[Verdict], findings: Sequence[Diagnosis], base: str | None) -> str:
    """What to do: remove the first fault, make the adapter smaller, or look at it with its base, or merge it."""
    for finding in findings:
        if finding.level != "note" and finding.fix:
            return f"{finding.fix[0].upper()}{finding.fix[1:]}."
    large = max(verdicts, key=lambda verdict: verdict.saved or 0.0)
    if large.saved is not None and large.saved >= WORTHWHILE:
        kept = f", and keeps {whole_percent(ENERGY_KEPT)} of the energy" if large.by_energy else ""
        return f"`{large.command}` saves {whole_percent(large.saved)} of the file{kept}."
    exam = verdicts[0].subject.examination
    if base is None:
        return f"`{exam.command('doctor', '--base', 'MODEL')}` compares it with its base."
    return f"`{exam.command('merge', '--base', quote_word(base), '-o', 'OUT')}` merges it into the base."


def _share(value: float | None) -> str:
    return UNDEFINED if value is None else percent(value)


def verdicts_table(verdicts: Sequence[Verdict]) -> Table[Verdict]:
    """The table of the first screen; columns of the base only where a base was given."""
    strong, rounded = (
        title if any(getattr(verdict.subject, key) is not None for verdict in verdicts) else ""
        for key, title in (("strength", "strength"), ("bf16_loss", "bf16 loss"))
    )
    needed = "the lowest rank for all modules that keeps 99 % of the energy, and the highest rank now"
    columns: list[Column[Verdict]] = [
        Column("adapter", "subject.label", "adapter", align="left"),
        Column("verdict", "words", "verdict", align="left"),
        Column("rank_needed", "needed"),
        Column("rank", "of"),
        Column(
            "ranks",
            lambda row: UNDEFINED if row.needed is None else f"{row.needed} of {row.of}",
            "rank needed",
            json=False,
            about=needed,
        ),
        Column(
            "saved",
            "saved",
            "saves",
            _share,
            about="the share of the file that is saved at 99 % of the energy, with a rank for each module",
        ),
        Column(
            "strength",
            "subject.strength",
            strong,
            _share,
            about="‖ΔW‖/‖W‖ over all modules with a weight",
        ),
        Column(
            "bf16_loss",
            "subject.bf16_loss",
            rounded,
            _share,
            about="what a merge into bfloat16 weights loses, as a share of ‖ΔW‖",
        ),
        Column("errors", "levels.error"),
        Column("warnings", "levels.warning"),
        Column("notes", "levels.note"),
        Column(
            "findings",
            lambda row: ", ".join(count(n, level) for level, n in row.levels.items() if n) or "none",
            "findings",
            align="left",
            json=False,
        ),
    ]
    return Table("", columns, verdicts)


def headline(verdicts: Sequence[Verdict], collection: Collection | None, run: CheckpointRun | None) -> str:
    """The strongest fact in one sentence: the faults, or else how the adapters are related and which rank they need."""
    several = len(verdicts) > 1
    broken = [verdict for verdict in verdicts if verdict.levels["error"] or verdict.words.startswith("does nothing")]
    if broken and not several:
        return f"{broken[0].subject.label} {broken[0].words}."
    if broken:
        return f"{len(broken)} of {len(verdicts)} adapters do not work as they are: {_names(broken)}."
    if run:
        return f"{len(run.order)} checkpoints of one run: {settled_sentence(run)}."
    warned = [verdict for verdict in verdicts if verdict.levels["warning"]]
    total = count(sum(verdict.levels["warning"] for verdict in warned), "warning")
    if several:
        warnings = f"{total} for {_names(warned)}" if warned else ""
        parts = [_relation(verdicts, collection), warnings, _savings_of_all(verdicts)]
    else:
        parts = [f"{verdicts[0].subject.label} has {total}" if warned else "", _savings(verdicts[0])]
    text = "; ".join(filter(None, parts))
    # If the sentence begins with an adapter's name, its capitalisation is not changed.
    return f"{text.replace('rank', 'Rank', 1) if text.startswith('rank ') else text}."


def _names(verdicts: Sequence[Verdict]) -> str:
    labels = [verdict.subject.label for verdict in verdicts]
    # With four names or more the sentence would be too long for a headline.
    return join_words(labels) if len(labels) < 4 else f"{labels[0]} and {len(labels) - 1} more"


def _relation(verdicts: Sequence[Verdict], collection: Collection | None) -> str:
    """How the two most similar, or most opposed, of several adapters are related."""
    if collection is None:
        return "the adapters have no module in common"
    if not collection.closest:
        return ""
    s, t = collection.closest
    cosine = collection.cosines[s, t]
    words = in_words(cosine, float(collection.pairs.cosine_z[s, t]))
    return f"{verdicts[s].subject.label} and {verdicts[t].subject.label} {words} (cosine {signed(cosine)})"


def _savings(verdict: Verdict) -> str:
    """Return in words which rank one adapter needs."""
    subject, best = verdict.subject, verdict.subject.recommended
    if verdict.saved is None or best is None:
        return f"{subject.label} has no rank to choose"
    if verdict.saved < WORTHWHILE:
        return f"{subject.label} needs its rank of {verdict.of}"
    if verdict.by_energy:
        kept = whole_percent(ENERGY_KEPT)
        return f"{subject.label} would be {whole_percent(verdict.saved)} smaller with {kept} of the energy"
    return (
        f"rank {verdict.needed} of {verdict.of} keeps {percent(1 - best.uniform.error**2)} of {quantity(subject)}, and "
        f"the file would be {whole_percent(verdict.saved)} smaller"
    )


def _savings_of_all(verdicts: Sequence[Verdict]) -> str:
    smaller = [verdict for verdict in verdicts if verdict.saved is not None and verdict.saved >= WORTHWHILE]
    if not smaller:
        return "each of them needs its rank" if all(verdict.needed is not None for verdict in verdicts) else ""
    low, high = (whole_percent(bound(float(v.saved or 0) for v in smaller)) for bound in (min, max))
    which = "all" if len(smaller) == len(verdicts) else _names(smaller)
    return f"{which} could be smaller by {low if low == high else f'{low} to {high}'}"


def remarks(subject: Subject) -> list[str]:
    """What the sections say of one adapter: where its energy lies, and how it stands to its base."""
    return [*_energy(subject), *_base(subject)]


def summary_of(subjects: Sequence[Subject]) -> list[str]:
    """The summary of each adapter: a sentence a line, or the sentences of several adapters in a line for each."""
    lines = []
    for subject in subjects:
        ranks = [advice(subject)] if subject.points and subject.norm else []
        sentences = [*_energy(subject), *ranks, *_base(subject)]
        lines += [f"{subject.label}: {' '.join(sentences)}"] if len(subjects) > 1 else sentences
    return lines


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
        # The median is given too, because the worst of many modules may be an exception.
        middle = median(x.rounding.error for x in effects.values())
        sentences.append(
            f"{merge} would preserve ΔW: its largest error in any module is {error_in_words(largest)}."
            if largest < FAITHFUL
            else f"{merge} would have an error of {percent(middle)} of ‖ΔW‖ in the median module and of "
            f"{percent(largest)} in the worst, {worst}."
        )
    return sentences


def run_sentence(run: CheckpointRun) -> str:
    """From which step on the direction of ΔW has settled, and whether φ of the in side means anything, in words."""
    settled = settled_sentence(run)
    text = f"{settled[0].upper()}{settled[1:]}"
    trajectory = run.trajectory
    if not trajectory.points[-1].frobenius:
        return f"{text}."
    if trajectory.settled is not None:
        text += f": from there on every cosine with the last checkpoint is at least {SETTLED:g}"
    # The first checkpoint is the farthest from the last. If even its A is close to the last A, all others are too.
    first = trajectory.points[0]
    if first.initial >= STUCK and first.phi["in"] > first.phi["out"]:
        text += ". A stays close to its random initialisation, so φ of the in side is high throughout: judge by the "
        text += "out side"
    return f"{text}."


def settled_sentence(run: CheckpointRun) -> str:
    """A clause that says whether the direction of ΔW has settled, without a capital and without a full stop."""
    trajectory, steps = run.trajectory, run.steps
    before = trajectory.points[-2].cosine
    if not trajectory.points[-1].frobenius:
        return "the last checkpoint is 0, so there is no direction to compare the others with"
    if trajectory.settled is not None:
        return f"the direction is settled from step {steps[trajectory.settled]} on (of {steps[-1]})"
    if isfinite(before):
        return (
            f"the direction was still turning: cosine {fixed('.3f')(before)} between steps {steps[-2]} and {steps[-1]}"
        )
    return "the checkpoint before the last is 0, so it is unknown whether the direction has settled"


def name_on_page(row: MeasuredAdapter, subjects: Sequence[Subject]) -> MeasuredAdapter:
    """The row of an evaluation under the name that the adapter has on the page, or under the end of its path."""
    labels = {subject.path: subject.label for subject in subjects}
    return row._replace(path="the model alone" if row.path is None else labels.get(row.path) or PurePath(row.path).name)


def quality_sentence(evaluation: StoredEvaluation) -> str:
    """The best-known measure of an evaluation, and its values with some adapters."""
    measured = evaluation.adapters[0].measures
    measure = next((name for name in MEASURES.get(evaluation.task, ("loss",)) if name in measured), "")
    texts = f"{count(evaluation.texts, 'text')} of {evaluation.data}"
    if not measure:
        return f"{count(len(evaluation.adapters), 'adapter')} measured on {texts}."
    values = []
    for row in evaluation.adapters[:NAMED]:
        value = row.measures.get(measure)
        parameters = f" ({row.parameters:,} parameters)" if row.parameters is not None else ""
        text = percent(value) if measure == "accuracy" else number(value)
        values.append(f"{text} with {row.path}{parameters}")
    unnamed = len(evaluation.adapters) - NAMED
    values += [f"{unnamed} more below"] if unnamed > 0 else []
    return f"On {texts}: {measure} {join_words(values)}."
