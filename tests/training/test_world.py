"""Two processes that train together, by DDP and in shards, beside one that trains alone."""

import pickle
from typing import Any

import numpy as np
import pytest

from tests.processes import run_module
from tests.tolerances import PROCESSES
from tests.training import pair, pair_loaders

pytestmark = pytest.mark.slow

pytest.importorskip("peft")

EXACT = [name for name, options in pair.CASES.items() if "optimiser" not in options]  # AdamW amplifies rounding


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("pair")
    run_module("tests.training.pair", folder)
    return {name: pickle.loads((folder / f"{name}.pickle").read_bytes()) for name in ("0", "1", "alone")}


def close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert set(found) == set(wanted)
    for name, array in found.items():
        np.testing.assert_allclose(array, wanted[name], **PROCESSES, err_msg=name)


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_come_to_what_one_does(runs: dict[str, Any], name: str) -> None:
    whole, single = runs["0"][name]["whole"], runs["alone"][name]
    np.testing.assert_allclose(whole["losses"], single["losses"], rtol=1e-5)
    close(whole["numbers"], single["numbers"])
    assert (whole["steps"], whole["best_step"]) == (single["steps"], single["best_step"])
    assert (whole["steps"] < pair.STEPS) == ("patience" in name)
    # Each process has measured its part of the examples, and all of them know the measures over all.
    for (step, found), (same, wanted) in zip(whole["evaluations"], single["evaluations"], strict=True):
        assert step == same
        assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", pair.CASES)
def test_both_processes_come_to_the_same(runs: dict[str, Any], name: str) -> None:
    zero, one = (runs[rank][name]["whole"] for rank in "01")
    assert zero["losses"] == one["losses"]
    assert zero["evaluations"] == one["evaluations"]
    for key, array in zero["numbers"].items():
        np.testing.assert_array_equal(array, one["numbers"][key])


@pytest.mark.parametrize("name", pair.CASES)
def test_the_first_process_alone_is_called(runs: dict[str, Any], name: str) -> None:
    zero, one = (runs[rank][name]["whole"] for rank in "01")
    assert one["calls"] == one["states"] == []
    kinds = {call[0] for call in zero["calls"]}
    assert kinds == {"step", "evaluation", "snapshot"}
    assert [call for call in zero["calls"] if call[0] == "step"] == [
        call for call in runs["alone"][name]["calls"] if call[0] == "step"
    ]  # the sizes too: tokens of all processes


@pytest.mark.parametrize("name", pair.CASES)
def test_a_run_goes_on_as_if_it_had_not_stopped(runs: dict[str, Any], name: str) -> None:
    whole, rest = runs["0"][name]["whole"], runs["0"][name]["rest"]
    assert rest["losses"] == whole["losses"][2:]
    assert rest["best_step"] == whole["best_step"]
    for key, array in whole["numbers"].items():
        np.testing.assert_array_equal(array, rest["numbers"][key])


@pytest.mark.parametrize("kind", pair_loaders.KINDS)
def test_no_row_of_a_loader_is_lost(runs: dict[str, Any], kind: str) -> None:
    zero, one = (runs[rank]["loaders"][kind]["whole"]["rows"] for rank in "01")
    half = pair_loaders.TEXTS // 2
    rounds = [sorted(zero[start : start + half] + one[start : start + half]) for start in (0, half)]
    assert rounds == [list(range(pair_loaders.TEXTS))] * 2
    assert zero[:half] != zero[half:]  # every round has its own order


@pytest.mark.parametrize("kind", pair_loaders.KINDS)
def test_two_processes_go_on_with_the_rows_that_are_left(runs: dict[str, Any], kind: str) -> None:
    for rank in "01":
        whole, rest = (runs[rank]["loaders"][kind][part] for part in ("whole", "rest"))
        assert rest["rows"] == whole["rows"][6:]
        assert rest["noise"] == whole["noise"]  # what was seen is passed over, and drawn again for that
        assert rest["losses"] == whole["losses"][3:]


@pytest.mark.parametrize("how", ["ddp", "shard"])
def test_every_label_weighs_alike_whichever_process_has_it(runs: dict[str, Any], how: str) -> None:
    single, zero = runs["alone"]["loaders"]["masked"], runs["0"]["loaders"][how]
    np.testing.assert_allclose(zero["losses"], single["losses"], rtol=1e-6)
    close(zero["numbers"], single["numbers"])


def test_a_layer_that_is_not_called_stops_both_before_their_gradients_are_used(runs: dict[str, Any]) -> None:
    for rank in "01":
        assert runs[rank]["loaders"]["unreached"].startswith("a step gives no gradient to passed, which DDP needs")


def test_where_the_first_process_fails_the_others_end_quietly(runs: dict[str, Any]) -> None:
    assert runs["0"]["refused"] == {"error": "only I can see it"}
    assert runs["1"]["refused"] == {"exit": 1}
