"""The training benchmark at a tiny size: both sides compute the same, and the part for a GPU runs as it is."""

from dataclasses import replace

import pytest

from tests.marks import when_used

when_used("peft")
pytest.importorskip("transformers")

from benchmarks import train_card, train_sides  # noqa: E402


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test of this file."""


@pytest.fixture(scope="module")
def llama() -> train_sides.Setting:
    return train_card.setting("cpu", train_card.TINY)


@pytest.mark.slow
def test_both_sides_take_the_same_steps(llama: train_sides.Setting) -> None:
    wide = replace(llama, make=lambda: llama.make().float())
    seen = train_sides.in_turn(wide, turns=4, warm=1)
    assert all(len(seen.seconds[side]) == 4 for side in train_sides.SIDES)
    assert seen.losses["ours"] == pytest.approx(seen.losses["peft"], rel=1e-5)
    assert seen.losses["ours"] == pytest.approx(seen.losses["ours_by_hand"], rel=1e-5)
    assert len(set(seen.losses["ours"])) == 4  # it learns, and batches differ
