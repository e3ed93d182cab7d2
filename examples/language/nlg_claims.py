"""What the LoRA paper says in its table of methods and its Section 7, compared with the numbers of `nlg_study.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

from language.claims import SAME, Claim, Verdict, is_larger, is_no_larger, missing, per_seed, within

Groups = Mapping[str, Sequence[Mapping[str, Any]]]
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
        _amplification(numbers, ranks),
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
    texts, factors = [], []
    for name, measures in seeds.items():
        ratios = [measures[key]["phi_all"] / measures[key]["chance_all"] for key in _keys(seeds, ("in", "out"))]
        factors += ratios
        texts.append(f"{name}: φ of all directions is {min(ratios):.1f} to {max(ratios):.1f} times that of chance")
    # φ of chance varies little with so many directions; a factor of 1.5 is far outside.
    return Claim(text, "; ".join(texts), within(factors, 1.5, float("inf")))


def _keys(compared: Mapping[str, Any], sides: Sequence[str]) -> list[str]:
    """The keys of φ of every kind of module on the sides of ΔW."""
    first = next(iter(compared.values()))
    return [key for key in first if key.rpartition(" ")[2] in sides]


def _amplification(numbers: Mapping[str, Any], ranks: Sequence[int]) -> Claim:
    text = "ΔW amplifies directions of W, and more so at a low rank (Table 7)"
    rows, low, high = numbers["amplification"], min(ranks), max(ranks)
    kinds = [name.partition(", ")[2] for name in rows if name.startswith(f"r = {low},")]
    pairs = [(rows[f"r = {low}, {kind}"], rows.get(f"r = {high}, {kind}"), kind) for kind in kinds]
    pairs = [pair for pair in pairs if pair[1]]
    if not pairs:
        return missing(text)
    factors = "; ".join(
        f"{kind}: {one['amplification']:.2g} at r = {low}, {other['amplification']:.2g} at r = {high}; divided by "
        f"that of random directions, {one['excess']:.2g} and {other['excess']:.2g}"
        for one, other, kind in pairs
    )
    rising = [one["amplification"] > other["amplification"] for one, other, _ in pairs]
    verdict: Verdict = "agrees" if all(rising) else "not decided" if any(rising) else "does not agree"
    return Claim(text, factors, verdict)


RULES = f"""
Methods are compared by their loss: BLEU of so few sentences is too uncertain. *Agrees* means that every seed says so,
*not decided* that the seeds differ. Losses that differ by less than {SAME} nats are called equal."""
