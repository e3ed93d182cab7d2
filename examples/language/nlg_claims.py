"""What the LoRA paper says in its table of methods and its Section 7, compared with the numbers of `nlg_study.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from language.claims import SAME, Claim, Verdict, is_larger, is_no_larger, missing, per_seed, within

from loralens.linalg.chance import overlap_spread

Groups = Mapping[str, Sequence[Mapping[str, Any]]]
BEYOND = 3.0  # standard deviations above chance
SHARED = 0.5  # the paper: the first direction of r = 8 and r = 64 overlaps with a similarity above 0.5


def claims(numbers: Mapping[str, Any], groups: Groups) -> list[Claim]:
    """Every claim with what was measured; ``groups``: name → the runs of a method at its best rate."""
    ranks = numbers["plan"]["ranks"]
    small, low, high = (f"LoRA r = {rank}, q and v" for rank in (8, min(ranks), max(ranks)))
    return [
        _gap("LoRA is no worse than full fine-tuning (Table 3)", groups, small, "full fine-tuning", better=False),
        _gap("LoRA is better than a prefix (Table 3)", groups, small, "prefix of 16 tokens"),
        _gap("LoRA is better than bottleneck adapters (Table 3)", groups, small, "bottlenecks of width 8"),
        _gap(f"r = {min(ranks)} is as good as r = {max(ranks)} (Table 6)", groups, low, high, better=False),
        _directions("r = 8 and r = 64 share their first direction (Figure 3)", numbers["ranks"]),
        _seeds("Two seeds share more directions than chance (Figure 4)", numbers["seeds"]),
        *_amplification(numbers, ranks),
    ]


def _gap(text: str, groups: Groups, first: str, second: str, *, better: bool = True) -> Claim:
    """Losses of two methods, seed by seed; ``better``: the claim is that the first has a lower loss."""
    pairs = [(one, other) for one in groups.get(first, []) for other in groups.get(second, [])]
    pairs = [(one, other) for one, other in pairs if one["seed"] == other["seed"]]
    losses = [one["loss"] - other["loss"] for one, other in pairs if None not in (one["loss"], other["loss"])]
    if not losses:
        return missing(text)
    bleu = [one["bleu"] - other["bleu"] for one, other in pairs]
    noise = max(run["interval"] for pair in pairs for run in pair)
    measured = (
        f"{first} − {second}: loss {per_seed(losses, '+.3f')}, BLEU {per_seed(bleu, '+.1f')} (± {noise:.1f} over texts)"
    )
    verdict = is_larger([-loss for loss in losses]) if better else is_no_larger(losses)
    return Claim(text, measured, verdict)


def _directions(text: str, ranks: Mapping[str, Any]) -> Claim:
    if not ranks:
        return missing(text)
    sides = {key: [one[key]["phi_1_1"] for one in ranks.values()] for key in _keys(ranks, ("in", "out"))}
    chance = max(one[key]["chance_1_1"] for one in ranks.values() for key in sides)
    values_text = "; ".join(f"{key} {per_seed(values, '.2f')}" for key, values in sides.items())
    verdict = within([value for values in sides.values() for value in values], SHARED, 1.0)
    return Claim(text, f"φ(1, 1): {values_text}; chance at most {chance:.3f}, the paper above {SHARED}", verdict)


def _seeds(text: str, seeds: Mapping[str, Any]) -> Claim:
    if not seeds:
        return missing(text)
    texts, distances = [], []
    for name, measures in seeds.items():
        compared = [measures[key] for key in _keys(seeds, ("in", "out"))]
        ratios = [one["phi_all"] / one["chance_all"] for one in compared]
        far = [_spreads_above_chance(one) for one in compared]
        distances += far
        texts.append(
            f"{name}: φ of all directions is {min(ratios):.1f} to {max(ratios):.1f} times that of chance, and at least "
            f"{min(far):.0f} standard deviations above it"
        )
    return Claim(text, "; ".join(texts), within(distances, BEYOND, float("inf")))


def _spreads_above_chance(measures: Mapping[str, float]) -> float:
    """How far φ of all directions is above that of random subspaces, in standard deviations of one module.

    φ is a median over modules, which varies less than one of them: the number is too small rather than too large.
    """
    n = round(1 / measures["chance_1_1"])
    k = round(measures["chance_all"] * n)
    spread = overlap_spread(k, k, n)
    # Subspaces of all dimensions are equal, which says nothing.
    return (measures["phi_all"] - measures["chance_all"]) / spread if spread else 0.0


def _keys(compared: Mapping[str, Any], sides: Sequence[str]) -> list[str]:
    """The keys of φ of every kind of module on the sides of ΔW."""
    first = next(iter(compared.values()))
    return [key for key in first if key.rpartition(" ")[2] in sides]


def _amplification(numbers: Mapping[str, Any], ranks: Sequence[int]) -> list[Claim]:
    low, high = min(ranks), max(ranks)
    falls = f"ΔW amplifies directions of W, r = {low} more than r = {high} (Table 7)"
    chooses = "These directions are special: random ones are amplified less (a question that the paper does not ask)"
    rows = numbers["amplification"]
    kinds = [name.partition(", ")[2] for name in rows if name.startswith(f"r = {low},")]
    pairs = [(rows[f"r = {low}, {kind}"], rows.get(f"r = {high}, {kind}"), kind) for kind in kinds]
    pairs = [pair for pair in pairs if pair[1]]
    if not pairs:
        return [missing(falls), missing(chooses)]

    def both(key: str) -> str:
        return "; ".join(
            f"{kind}: {one[key]:.2g} at r = {low}, {other[key]:.2g} at r = {high}" for one, other, kind in pairs
        )

    amplified = [one["amplification"] > max(1, other["amplification"]) for one, other, _ in pairs]
    beyond = [measures["z"] for *two, _ in pairs for measures in two]
    return [
        Claim(falls, f"the factor of {both('amplification')}", _all_or_none(amplified)),
        Claim(
            chooses,
            f"‖UᵀWV‖ divided by that of random directions, {both('excess')} (z from {min(beyond):.1f} to "
            f"{max(beyond):.1f})".replace("-", "−"),
            within(beyond, BEYOND, float("inf")),
        ),
    ]


def _all_or_none(true: Sequence[bool]) -> Verdict:
    return "agrees" if all(true) else "not decided" if any(true) else "does not agree"


RULES = f"""
Methods are compared by their loss: BLEU of so few sentences is too uncertain. *Agrees* means that every seed says so,
*not decided* that the seeds differ. Losses that differ by less than {SAME} nats are called equal."""
