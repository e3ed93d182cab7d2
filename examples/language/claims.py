"""Claims of a paper beside what was measured here: whether every seed agrees."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from paper_report import table

from loralens.tables.numbers import UNDEFINED, fixed

Verdict = Literal["agrees", "does not agree", "not decided", "not measured"]
SAME = 0.02  # nats per token: losses that differ by less are called equal


class Claim(NamedTuple):
    """What a paper says, what was measured here, and whether that agrees."""

    text: str
    measured: str
    verdict: Verdict


def claim_table(claims: Sequence[Claim], seeds: int) -> str:
    """The claims as Markdown; what one seed alone says is marked."""
    one = {"agrees", "does not agree"} if seeds == 1 else set()
    rows = [
        [claim.text, claim.measured, f"**{claim.verdict}**{', one seed' if claim.verdict in one else ''}"]
        for claim in claims
    ]
    return table(["claim", "here (one number for each seed)", ""], rows)


def per_seed(values: Sequence[float], form: str) -> str:
    """One number for each seed."""
    return " and ".join(fixed(form)(value) for value in values) if values else UNDEFINED


def missing(text: str) -> Claim:
    """A claim for which something was not measured."""
    return Claim(text, "missing", "not measured")


def is_larger(differences: Sequence[float]) -> Verdict:
    """Whether all differences are larger than `SAME`: ``agrees``, or ``does not agree`` if none is."""
    if not differences:
        return "not measured"
    larger = [difference > SAME for difference in differences]
    return "agrees" if all(larger) else "not decided" if any(larger) else "does not agree"


def is_no_larger(differences: Sequence[float]) -> Verdict:
    """The opposite of `is_larger`."""
    opposite: dict[Verdict, Verdict] = {"agrees": "does not agree", "does not agree": "agrees"}
    verdict = is_larger(differences)
    return opposite.get(verdict, verdict)


def within(values: Sequence[float], low: float, high: float) -> Verdict:
    """Whether all values lie in a range: ``agrees``, or ``does not agree`` if none does."""
    if not values:
        return "not measured"
    inside = [low <= value <= high for value in values]
    return "agrees" if all(inside) else "not decided" if any(inside) else "does not agree"


def seeds_of(runs: Iterable[Mapping[str, Any]]) -> list[int]:
    """The seeds of some runs."""
    return sorted({int(run["seed"]) for run in runs})


def seeds_line(numbers: Mapping[str, Any]) -> str:
    """The seeds of the runs that are done, and whether the plan has others."""
    done, planned = seeds_of(numbers["runs"]), sorted(numbers["plan"]["seeds"])
    text = ", ".join(map(str, done)) or "none"
    return text if done == planned else f"{text} (planned: {', '.join(map(str, planned))})"
