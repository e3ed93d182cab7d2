"""The first screen of a report: the strongest fact in one sentence, and one row of a table per adapter."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from loralens.analysis.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.interference import in_words
from loralens.reporting.collection import CheckpointRun, Collection, finite_cosines
from loralens.reporting.document import PageTable
from loralens.reporting.run import settled_sentence
from loralens.reporting.subject import Subject
from loralens.tables.numbers import UNDEFINED, count, join_words, percent, signed, span, whole_percent
from loralens.tables.table import Column, Table

# If less than this share of the file would be saved, a smaller file is not worth writing.
WORTHWHILE = 0.05
CODES = 3  # codes of findings that a sentence lists


class AdapterVerdict(NamedTuple):
    """One row of the table on the first screen: the verdict on one adapter.

    Attributes
    ----------
    needed, of : int or None
        The lowest rank for all modules that keeps 99 % of the energy, and the highest rank; None where there is none.
    saved : float or None
        The share of the file that the rank saves.
    strength : float or None
        ‖ΔW‖/‖W‖ over all modules that have a weight in the base; None without a base.
    bf16_loss : float or None
        ‖W'−W−ΔW‖/‖ΔW‖ where W' is W + ΔW rounded to bfloat16; None without a base.
    levels : mapping of str to int
        Level → the number of findings with different causes.
    """

    label: str
    words: str
    needed: int | None
    of: int | None
    saved: float | None
    strength: float | None
    bf16_loss: float | None
    levels: Mapping[str, int]


def verdict_of(subject: Subject, findings: Sequence[Diagnosis]) -> AdapterVerdict:
    """Return the row of one adapter; ``findings`` has those of all adapters."""
    own = [same[0] for same in by_cause(findings) if same[0].adapter == subject.path]
    levels = Counter(finding.level for finding in own)
    best, highest = (subject.recommended, subject.highest) if subject.norm else (None, None)
    saved = None
    if best and highest:
        # Never below 0: because of its header, a file of lower rank may be larger, and then nothing is saved.
        saved = max(0.0, 1 - best.uniform.bytes / subject.bytes_before)
    return AdapterVerdict(
        label=subject.label,
        words=_words(subject, own, saved),
        needed=best.rank if best else None,
        of=highest.rank if highest else None,
        saved=saved,
        strength=subject.strength,
        bf16_loss=subject.bf16_loss,
        levels={level: levels[level] for level in LEVELS},
    )


def _words(subject: Subject, own: Sequence[Diagnosis], saved: float | None) -> str:
    """The verdict in a few words; the most serious fact comes first."""
    for level, words in (("error", "does not work as it is"), ("warning", "look at it first")):
        codes = list(dict.fromkeys(finding.code for finding in own if finding.level == level))
        if codes:
            tail = f" and {len(codes) - CODES} more" if len(codes) > CODES else ""
            return f"{words}: {', '.join(codes[:CODES])}{tail}"
    if not subject.norm:
        return "does nothing: ΔW is 0"
    if saved is None:
        return "in order"
    return "in order, larger than it needs to be" if saved >= WORTHWHILE else "in order, needs its size"


def verdicts_table(verdicts: Sequence[AdapterVerdict]) -> PageTable:
    """The table of the first screen; columns of the base only where a base was given."""
    against_base = any(verdict.strength is not None for verdict in verdicts)
    rounded = any(verdict.bf16_loss is not None for verdict in verdicts)
    left_out = {*(() if against_base else ("strength",)), *(() if rounded else ("bf16_loss",))}
    columns = [column for column in COLUMNS if column.key not in left_out]
    return PageTable(Table("", columns, verdicts))


def _rank(pair: tuple[int | None, int | None]) -> str:
    needed, of = pair
    return UNDEFINED if needed is None else f"{needed} of {of}"


def _share(value: float | None) -> str:
    return UNDEFINED if value is None else percent(value)


def _counts(levels: Mapping[str, int]) -> str:
    return ", ".join(count(n, level) for level, n in levels.items() if n) or "none"


COLUMNS: tuple[Column[AdapterVerdict], ...] = (
    Column("adapter", lambda row: row.label, "adapter", align="left"),
    Column("verdict", lambda row: row.words, "verdict", align="left"),
    Column(
        "rank_needed",
        lambda row: (row.needed, row.of),
        "rank needed",
        _rank,
        about="the lowest rank for all modules that keeps 99 % of the energy, and the highest rank now",
    ),
    Column("saved", lambda row: row.saved, "saves", _share, about="the share of the file that this rank saves"),
    Column("strength", lambda row: row.strength, "strength", _share, about="‖ΔW‖/‖W‖ over all modules with a weight"),
    Column(
        "bf16_loss",
        lambda row: row.bf16_loss,
        "bf16 loss",
        _share,
        about="what a merge into bfloat16 weights loses, as a share of ‖ΔW‖",
    ),
    Column("findings", lambda row: row.levels, "findings", _counts, align="left"),
)


def verdict_record(verdict: AdapterVerdict) -> dict[str, object]:
    """A row as a JSON object."""
    return {
        "adapter": verdict.label,
        "verdict": verdict.words,
        "rank_needed": verdict.needed,
        "rank": verdict.of,
        "saved": verdict.saved,
        "strength": verdict.strength,
        "bf16_loss": verdict.bf16_loss,
        **{f"{level}s": verdict.levels[level] for level in LEVELS},
    }


def headline(
    subjects: Sequence[Subject],
    verdicts: Sequence[AdapterVerdict],
    collection: Collection | None,
    run: CheckpointRun | None,
) -> str:
    """The strongest fact in one sentence: the faults, or else how the adapters are related and which rank they need."""
    several = len(subjects) > 1
    broken = [verdict for verdict in verdicts if verdict.levels["error"] or verdict.words.startswith("does nothing")]
    if broken and not several:
        return f"{broken[0].label} {broken[0].words}."
    if broken:
        return f"{len(broken)} of {len(verdicts)} adapters do not work as they are: {_names(broken)}."
    if run:
        return f"{len(run.order)} checkpoints of one run: {settled_sentence(run)}."
    warned = [verdict for verdict in verdicts if verdict.levels["warning"]]
    parts = [_count_warnings(warned, several=several)] if warned else []
    if several:
        relation = _relation(subjects, collection)
        parts = [*([relation] if relation else []), *parts, *_savings_of_all(verdicts)]
    else:
        parts = [*parts, _savings(subjects[0], verdicts[0])]
    text = "; ".join(filter(None, parts))
    # If the sentence begins with an adapter's name, its capitalisation is not changed.
    return f"{text.replace('rank', 'Rank', 1) if text.startswith('rank ') else text}."


def _names(verdicts: Sequence[AdapterVerdict]) -> str:
    labels = [verdict.label for verdict in verdicts]
    # With four names or more the sentence would be too long for a headline.
    return join_words(labels) if len(labels) < 4 else f"{labels[0]} and {len(labels) - 1} more"


def _count_warnings(warned: Sequence[AdapterVerdict], *, several: bool) -> str:
    total = count(sum(verdict.levels["warning"] for verdict in warned), "warning")
    return f"{total} for {_names(warned)}" if several else f"{warned[0].label} has {total}"


def _relation(subjects: Sequence[Subject], collection: Collection | None) -> str:
    """How the two most similar, or most opposed, of several adapters are related."""
    cosines = finite_cosines(collection.pairs) if collection else {}
    if not collection or not cosines:
        return "the adapters have no module in common" if collection is None else ""
    s, t = max(cosines, key=lambda pair: abs(cosines[pair]))
    cosine, z = cosines[s, t], float(collection.pairs.cosine_z[s, t])
    words = in_words(cosine, z)
    return f"{subjects[s].label} and {subjects[t].label} {words} (cosine {signed(cosine)})"


def _savings(subject: Subject, verdict: AdapterVerdict) -> str:
    """Return in words which rank one adapter needs."""
    if verdict.needed is None or verdict.saved is None:
        return f"{verdict.label} has no rank to choose"
    if verdict.saved < WORTHWHILE:
        return f"{verdict.label} needs its rank of {verdict.of}"
    best = subject.recommended
    assert best is not None
    share = percent(1 - best.uniform.error**2)
    what = "the squared output on the inputs given" if subject.on_data else "the energy"
    return (
        f"rank {verdict.needed} of {verdict.of} keeps {share} of {what}, and the file would be "
        f"{whole_percent(verdict.saved)} smaller"
    )


def _savings_of_all(verdicts: Sequence[AdapterVerdict]) -> list[str]:
    smaller = [verdict for verdict in verdicts if verdict.saved is not None and verdict.saved >= WORTHWHILE]
    if not smaller:
        return ["each of them needs its rank"] if all(verdict.needed is not None for verdict in verdicts) else []
    low, high = (whole_percent(bound(float(v.saved or 0) for v in smaller)) for bound in (min, max))
    which = "all" if len(smaller) == len(verdicts) else _names(smaller)
    ranks = span([verdict.needed for verdict in smaller if verdict.needed is not None])
    by = low if low == high else f"{low} to {high}"
    return [f"{which} could be smaller by {by} (rank {ranks})"]
