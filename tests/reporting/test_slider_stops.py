"""What the page carries: the size of a file of any ranks, to the byte, and every stop of its sliders."""

import json
from dataclasses import replace

import numpy as np
import pytest

from loralens.compression.loss import total_error
from loralens.compression.plan import TruncationPlan
from loralens.core.lowrank import Layout as Kind
from loralens.core.lowrank import LowRank
from loralens.core.ranks import Rule
from loralens.reporting import slider_stops, subject
from loralens.reporting.ranks import slider_data
from loralens.reporting.slider_stops import STOPS, budget_stops, find_layout, rank_groups, rank_stops
from loralens.tables.numbers import percent, size
from tests.reporting.adapters import NAMES, dialect, drawn, measured

ABOUT = ("error", "kept", "bytes", "now")


@pytest.mark.parametrize("name", ["peft", "kohya", "comfyui"])
@pytest.mark.parametrize("rank", [2, 6, 12])
def test_the_file_has_the_size_that_the_layout_says_at_any_ranks(name: str, rank: int) -> None:
    adapter = replace(drawn(rank=rank), format=name)
    to = dialect(name)
    plan = TruncationPlan.of(adapter)
    found = find_layout(plan, to)
    assert found is not None
    rng = np.random.default_rng(3)
    for _ in range(8):
        ranks = {module: int(rng.integers(1, rank + 1)) for module in plan.directions}
        assert found.size(ranks) == to.size(plan.at(ranks))


@pytest.mark.parametrize("most", [0, 200])
def test_metadata_that_name_the_rank_of_all_modules_follow_no_rule(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(slider_stops, "GROUPS", most)
    adapter = replace(drawn(), format="kohya", metadata={"ss_network_dim": "6", "ss_network_alpha": "6"})
    assert find_layout(TruncationPlan.of(adapter), dialect("kohya")) is None


def test_many_modules_have_approximate_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    (few,) = measured({"x": drawn()})
    assert few.layout is not None
    monkeypatch.setattr(subject, "MANY", len(few.spectra) - 1)
    (many,) = measured({"x": drawn()})
    assert many.layout is None
    # The curve is exact in any case.
    assert many.points == few.points
    monkeypatch.setattr(slider_stops, "GROUPS", 0)
    (tested_once,) = measured({"x": drawn()})
    assert tested_once.points == few.points


def test_one_rank_dialects_have_one_item() -> None:
    adapter = replace(drawn(), format="mlx")
    to = dialect("mlx", one_rank=True)
    plan = TruncationPlan.of(adapter)
    found = find_layout(plan, to)
    assert found is not None
    for rank in (1, 3, 6):
        ranks = dict.fromkeys(plan.directions, rank)
        assert found.size(ranks) == to.size(plan.at(ranks))


def test_experts_of_a_stack_are_one_item() -> None:
    names = ["model.layers.0.mlp.experts.up_proj[0]", "model.layers.0.mlp.experts.up_proj[1]", *NAMES[:2]]
    adapter = drawn(names=names)
    first = adapter[names[0]]
    expert = LowRank(first.B, first.A, first.scale, scaling=first.scaling, layout=Kind("experts"))
    modules = {name: expert if "[" in name else module for name, module in adapter.items()}
    plan = TruncationPlan.of(replace(adapter, modules=modules))
    of = rank_groups(plan, dialect())
    assert of[names[0]] == of[names[1]]
    assert len(set(of.values())) == 3


@pytest.mark.parametrize("name", ["loralib", "diffusers"])
def test_pickles_and_headers_that_say_ranks_follow_no_such_rule_and_have_the_stops_of_the_curve(name: str) -> None:
    adapter = replace(drawn(), format=name)
    (one,) = measured({"x": adapter}, dialect(name))
    assert one.plan is not None
    assert find_layout(one.plan, one.dialect) is None
    stops = budget_stops(one.plan, one.dialect, one.points, None)
    assert [stop.value for stop in stops] == sorted({point.budget.bytes for point in one.points})
    assert stops[-1].bytes == one.dialect.size(adapter)
    for stop in stops:
        chosen = dict(zip(one.plan.directions, stop.ranks, strict=True))
        assert stop.error == total_error(one.plan.losses(chosen))
        assert stop.bytes == one.dialect.size(one.plan.at(chosen))
    carried = slider_data(one, 0)
    about = {key: {stop[key].startswith("about ") for stop in carried["budget"]["stops"]} for key in ABOUT}
    assert about == {"error": {True}, "kept": {True}, "bytes": {True}, "now": {False}}
    assert not any(stop[key].startswith("about") for stop in carried["rank"]["stops"] for key in ABOUT)


@pytest.mark.some(1)
@pytest.mark.parametrize(("form", "one_rank"), [("peft", False), ("kohya", False), ("mlx", True)])
def test_every_stop_is_what_compress_chooses(form: str, one_rank: bool) -> None:
    (one,) = measured({"x": replace(drawn(3), format=form)}, dialect(form, one_rank=one_rank))
    assert one.plan is not None
    stops = budget_stops(one.plan, one.dialect, one.points, find_layout(one.plan, one.dialect))
    assert len(stops) == STOPS
    assert [stop.value for stop in stops] == sorted(stop.value for stop in stops)
    assert (set(stops[0].ranks), stops[-1].bytes) == ({1}, one.dialect.size(one.adapter))
    for stop in stops:
        ranks = one.plan.ranks(Rule("bytes", stop.value), size=one.dialect.size, one_rank=one_rank)
        assert stop.ranks == list(ranks.values())
        assert stop.bytes == one.dialect.size(one.plan.at(ranks)) <= stop.value
        assert stop.error == total_error(one.plan.losses(ranks))
    for stop in rank_stops(one.plan, one.dialect, one.points):
        ranks = one.plan.ranks(Rule("rank", stop.value), one_rank=one_rank)
        assert stop.ranks == list(ranks.values())
        assert stop.bytes == one.dialect.size(one.plan.at(ranks))
        assert stop.error == total_error(one.plan.losses(ranks))


def test_what_is_carried_says_the_numbers_of_its_stops_in_the_units_of_the_page() -> None:
    (one,) = measured({"x": drawn()})
    assert one.plan is not None
    carried = slider_data(one, 2)
    json.dumps(carried, allow_nan=False)
    assert carried["picture"] == "curve-3"
    best, whole = one.recommended, one.dialect.size(one.adapter)
    assert best is not None
    uniform, budget = carried["rank"], carried["budget"]
    assert [stop["value"] for stop in uniform["stops"]] == ["1", "2", "3", "4", "5", "6"]
    assert uniform["stops"][uniform["start"]] == {
        "value": str(best.rank),
        "option": f"--rank {best.rank}",
        "error": percent(best.uniform.error),
        "kept": percent(1 - best.uniform.error**2),
        "bytes": size(best.uniform.bytes),
        "now": percent(best.uniform.bytes / whole),
        "ranks": f"rank {best.rank}",
        "at": [best.uniform.bytes / 1000, 100 * best.uniform.error],
        "chosen": [best.rank] * len(one.plan.directions),
    }
    near = budget["stops"][budget["start"]]
    assert int(near["option"].removeprefix("--size ")) >= best.uniform.bytes
    assert near["value"] == size(int(near["option"].removeprefix("--size ")))
