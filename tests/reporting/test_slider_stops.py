"""What the page carries: every stop of its sliders, with the size of its file to the byte."""

import json
from dataclasses import replace

import pytest

from loralens.compression.loss import total_error
from loralens.core.ranks import Rule
from loralens.reporting.ranks import slider_data
from loralens.reporting.slider_stops import STOPS, budget_stops, rank_stops
from loralens.tables.numbers import percent, size
from tests.reporting.adapters import dialect, drawn, measured


@pytest.mark.some(1)
@pytest.mark.parametrize(("form", "one_rank"), [("peft", False), ("kohya", False), ("mlx", True), ("loralib", False)])
def test_every_stop_is_what_compress_chooses(form: str, one_rank: bool) -> None:
    (one,) = measured({"x": replace(drawn(3), format=form)}, dialect(form, one_rank=one_rank))
    assert one.plan is not None
    stops = budget_stops(one.plan, one.dialect, one.points)
    assert len(stops) == STOPS
    assert [stop.value for stop in stops] == sorted(stop.value for stop in stops)
    assert (set(stops[0].ranks), stops[-1].bytes) == ({1}, one.dialect.size(one.adapter))
    for stop in stops:
        ranks = one.plan.ranks(Rule("parameters", stop.value), one_rank=one_rank)
        assert stop.ranks == list(ranks.values())
        assert one.plan.at(ranks).parameters <= stop.value
        assert stop.bytes == one.dialect.size(one.plan.at(ranks))
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
    parameters = int(near["option"].removeprefix("--parameters "))
    assert parameters >= best.uniform.parameters
    assert near["value"] == f"{parameters:,} parameters"
