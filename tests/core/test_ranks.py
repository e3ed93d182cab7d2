"""Rules that look at one module, and budgets that look at all: laws, and every choice tried."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loralens
from loralens import OptionError, Rule
from loralens.core import Layout
from loralens.core.ranks import (
    Item,
    Items,
    allocate_ranks,
    rank_items,
    ranks_from_items,
    shared_ranks,
    total_cost,
    total_gain,
    uniform,
    within,
)
from tests import reference
from tests.marks import examples
from tests.strategies import spectra

S = np.array([10.0, 5.0, 1.0])


def ranks(spectra, costs, rule, *, one_rank=False, **options):
    items = rank_items(spectra, costs, one_rank=one_rank, **options)
    return ranks_from_items(items, rule, spectra, one_rank=one_rank)


def items_of(gains, costs, least=0):
    return Items(
        Item((str(i),), np.array(g, float), cost, min(least, len(g)), len(g))
        for i, (g, cost) in enumerate(zip(gains, costs, strict=True))
    )


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (Rule("rank", 2), 2),
        (Rule("rank", 9), 3),
        (Rule("energy", 1.0), 3),
        (Rule("energy", 100 / 126), 1),
        (Rule("energy", 0.99), 2),
        (Rule("error", 0), 3),
        (Rule("error", 0.1), 2),
        (Rule("error", (26 / 126) ** 0.5), 1),
        (Rule("sv-ratio", 5), 2),  # sd-scripts keeps 3
        (Rule("sv-ratio", 1), 1),
        (Rule("sv-ratio", 10), 2),
        (Rule("sv-ratio", 11), 3),
        (Rule("sv-ratio", 11, 2), 2),
        (Rule("sv-cumulative", 10 / 16), 1),  # Σσ = 16
        (Rule("sv-cumulative", 0.9), 2),
        (Rule("sv-cumulative", 0.95), 3),
        (Rule("energy", 1.0, ceiling=2), 2),
        (Rule("energy", 0.5, ceiling=2), 1),
    ],
)
def test_rules_for_one_module(rule, rank):
    assert rule.rank_of(S) == rank
    assert rule.rank_of(S[:0]) == 0


@given(spectra(), st.floats(0, 0.999))
@settings(deadline=None)
def test_the_error_rule_keeps_the_error_and_no_direction_more(s, error):
    s = s[s > s[0] * 1e-14]
    k = Rule("error", error).rank_of(s)
    x = s / s[0]

    def tail(j):
        return np.linalg.norm(x[j:]) / np.linalg.norm(x)

    assert tail(k) <= error * (1 + 1e-12)
    assert k == 1 or tail(k - 1) > error * (1 - 1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rank", 0), ("rank", 1.5), ("energy", 0), ("energy", 1.01), ("error", 1), ("error", -0.1), ("sv-ratio", 0.9),
     ("sv-cumulative", 1.1),
     ("parameters", 0), ("bytes", -1), ("rank", float("nan")), ("energy", float("nan")), ("bytes", float("nan")),
     ("parameters", float("inf")), ("bytes", float("inf"))],
)  # fmt: skip
def test_values_that_make_no_sense(name, value):
    with pytest.raises(OptionError, match=name):
        Rule(name, value)


@st.composite
def budgets(draw, equal=False):
    count = draw(st.integers(1, 4))
    gains = [sorted(draw(st.lists(st.floats(0.01, 10), min_size=1, max_size=4)), reverse=True) for _ in range(count)]
    cost = st.just(draw(st.integers(1, 9))) if equal else st.integers(1, 9)
    costs = [draw(cost) for _ in range(count)]
    least = draw(st.integers(0, 1))
    floor = least * sum(costs)
    return gains, costs, floor + draw(st.integers(0, 40)), least


@given(budgets())
@examples(200)
def test_a_budget_is_kept_filled_and_never_worse_than_uniform(case):
    gains, costs, capacity, least = case
    items = items_of(gains, costs, least)
    chosen = allocate_ranks(items, capacity)
    found, left = total_gain(items, chosen), capacity - total_cost(items, chosen)
    assert left >= 0
    for rank in range(1 + max(map(len, gains))):
        if total_cost(items, uniform(items, rank)) <= capacity:
            assert found >= total_gain(items, uniform(items, rank)) - 1e-12
    best = reference.best_gain(gains, costs, capacity, least)
    assert best - max(g[0] for g in gains) - 1e-9 <= found <= best + 1e-9
    assert all(item.cost > left for item, k in zip(items, chosen, strict=True) if k < item.most)


@given(budgets(equal=True))
@examples(100)
def test_at_equal_costs_it_is_optimal(case):
    gains, costs, capacity, least = case
    items = items_of(gains, costs, least)
    best = reference.best_gain(gains, costs, capacity, least)
    assert total_gain(items, allocate_ranks(items, capacity)) == pytest.approx(best)


@given(budgets(), st.integers(0, 30))
@examples(100)
def test_an_exact_size_with_a_header_of_digits_is_kept_to_one_direction(case, more):
    gains, costs, capacity, least = case
    items = items_of(gains, costs, least)

    def size(chosen):
        return total_cost(items, chosen) + 7 + len("".join(map(str, chosen)) + str(total_cost(items, chosen)))

    budget = size(uniform(items, 0)) + capacity - total_cost(items, uniform(items, 0)) + more
    chosen = within(items, budget, size)
    assert size(chosen) <= budget
    for i, item in enumerate(items):
        if chosen[i] < item.most:
            assert size([k + (j == i) for j, k in enumerate(chosen)]) > budget
    same = within(items, budget, size, one_rank=True)
    rank = max(same)
    assert same == uniform(items, rank)
    assert size(same) <= budget
    higher = uniform(items, rank + 1)
    assert higher == same or size(higher) > budget


def test_a_budget_counts_energy():
    spectra_ = {"a": np.array([3.0]), "b": np.array([2.0, 1.0])}
    assert ranks(spectra_, {"a": 2, "b": 1}, Rule("parameters", 2), least=0) == {"a": 1, "b": 0}


def test_a_budget_below_the_least_says_the_least():
    with pytest.raises(OptionError, match="8 parameters are too few") as caught:
        ranks({"a": S, "b": S}, {"a": 5, "b": 4}, Rule("parameters", 8))
    assert "at least 9 parameters: rank 1 everywhere" in caught.value.fix
    assert ranks({"a": S, "b": S}, {"a": 5, "b": 4}, Rule("parameters", 9)) == {"a": 1, "b": 1}
    assert ranks({"a": S, "b": S}, {"a": 5, "b": 4}, Rule("parameters", 8), least=0) == {"a": 0, "b": 2}


def test_modules_of_one_tensor_share_a_rank():
    found = ranks({"e[0]": S, "e[1]": S[:1], "q": S}, dict.fromkeys(("e[0]", "e[1]", "q"), 1), Rule("energy", 0.99),
                  shared={"e[0]": "e", "e[1]": "e"})  # fmt: skip
    assert found == {"e[0]": 2, "e[1]": 2, "q": 2}
    budget = ranks({"e[0]": S, "e[1]": S, "q": S}, dict.fromkeys(("e[0]", "e[1]", "q"), 1), Rule("parameters", 4),
                   shared={"e[0]": "e", "e[1]": "e"})  # fmt: skip
    assert budget == {"e[0]": 1, "e[1]": 1, "q": 2}


def test_one_rank_is_the_highest_that_any_module_needs_and_narrower_ones_are_padded():
    spectra_, widths = {"a": S, "dead": S[:0], "narrow": S[:1]}, {"a": 4, "dead": 4, "narrow": 1}
    found = ranks(spectra_, dict.fromkeys(spectra_, 1), Rule("energy", 0.99), one_rank=True, widths=widths)
    assert found == {"a": 2, "dead": 2, "narrow": 2}
    assert ranks(spectra_, dict.fromkeys(spectra_, 1), Rule("rank", 8)) == {"a": 3, "dead": 1, "narrow": 1}


def test_weights_decide_where_directions_go():
    spectra_, costs = {"a": np.array([2.0, 1.0]), "b": np.array([2.0, 1.5])}, {"a": 1, "b": 1}
    assert ranks(spectra_, costs, Rule("parameters", 3)) == {"a": 1, "b": 2}
    assert ranks(spectra_, costs, Rule("parameters", 3), weights={"a": 10.0}) == {"a": 2, "b": 1}


def test_what_shares_a_rank():
    pair, expert = np.zeros((2, 1)), Layout("experts")
    modules = {
        "m.experts.up[0]": loralens.LowRank(pair, pair.T, layout=expert),
        "m.experts.up[1]": loralens.LowRank(pair, pair.T, layout=expert),
        "m.attn.in_proj_weight": loralens.LowRank(pair, pair.T),
        "m.attn.out_proj": loralens.LowRank(pair, pair.T),
        "m.self_attn.out_proj": loralens.LowRank(pair, pair.T),
    }
    assert shared_ranks(modules) == {
        "m.experts.up[0]": "m.experts.up",
        "m.experts.up[1]": "m.experts.up",
        "m.attn.in_proj_weight": "m.attn",
        "m.attn.out_proj": "m.attn",
    }
