"""What the page carries: the size of a file of any ranks, to the byte."""

import json
from dataclasses import replace

import numpy as np
import pytest

from loralens.compression.plan import Plan
from loralens.core.lowrank import Layout as Kind
from loralens.core.lowrank import LowRank
from loralens.reporting.allotment import carried, items, layout
from tests.reporting.adapters import NAMES, dialect, drawn


@pytest.mark.parametrize("name", ["peft", "kohya", "comfyui"])
@pytest.mark.parametrize("rank", [2, 6, 12])
def test_the_file_has_the_size_that_the_layout_says_at_any_ranks(name: str, rank: int) -> None:
    adapter = replace(drawn(rank=rank), format=name)
    to = dialect(name)
    plan = Plan.of(adapter)
    found = layout(plan, to)
    assert found is not None
    rng = np.random.default_rng(3)
    of = items(plan, to)
    for _ in range(8):
        ranks = {module: int(rng.integers(1, rank + 1)) for module in plan.found}
        assert found.size([ranks[module] for module in of]) == to.size(plan.at(ranks))


def test_one_rank_dialects_have_one_item() -> None:
    adapter = replace(drawn(), format="mlx")
    to = dialect("mlx", one_rank=True)
    plan = Plan.of(adapter)
    found = layout(plan, to)
    assert found is not None
    for rank in (1, 3, 6):
        assert found.size([rank]) == to.size(plan.at(dict.fromkeys(plan.found, rank)))


def test_experts_of_a_stack_are_one_item() -> None:
    names = ["model.layers.0.mlp.experts.up_proj[0]", "model.layers.0.mlp.experts.up_proj[1]", *NAMES[:2]]
    adapter = drawn(names=names)
    first = adapter[names[0]]
    expert = LowRank(first.B, first.A, first.scale, scaling=first.scaling, layout=Kind("experts"))
    modules = {name: expert if "[" in name else module for name, module in adapter.items()}
    plan = Plan.of(replace(adapter, modules=modules))
    of = items(plan, dialect())
    assert of[names[0]] == of[names[1]]
    assert len(set(of.values())) == 3


@pytest.mark.parametrize("name", ["loralib", "diffusers"])
def test_pickles_and_headers_that_say_ranks_follow_no_such_rule(name: str) -> None:
    adapter = replace(drawn(), format=name)
    plan, to = Plan.of(adapter), dialect(name)
    assert layout(plan, to) is None
    record = carried(plan, to, names={name: i for i, name in enumerate(adapter)}, path="p", label="l")
    whole = record["file"]["beside"] + sum(item["bytes"] * item["width"] for item in record["items"])
    assert whole == to.size(adapter)


def test_what_is_carried_is_what_ranks_are_chosen_by() -> None:
    adapter = drawn()
    plan = Plan.of(adapter)
    record = carried(plan, dialect(), names={name: 10 + i for i, name in enumerate(adapter)}, path="p", label="l")
    assert [item["modules"] for item in record["items"]] == [[10 + i] for i in range(len(adapter))]
    for item, (name, found) in zip(record["items"], plan.found.items(), strict=True):
        assert item["s"] == [found.s.tolist()]
        assert item["bytes"] == 4 * sum(adapter[name].shape)
        assert item["parameters"] == sum(adapter[name].shape)
    json.dumps(record, allow_nan=False)
