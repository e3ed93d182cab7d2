"""The vision example, told in full at a small size: what is trained, what it reads, and that every tool takes it."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

import loralens

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

import vision_lora  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = vision_lora.Size(channels=12, base_steps=150, steps=80)


class Told(NamedTuple):
    scores: dict[str, float]
    text: str
    out: Path


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    out, text = tmp_path_factory.mktemp("vision"), io.StringIO()
    with contextlib.redirect_stdout(text):
        scores = vision_lora.main(out, SMALL)
    return Told(scores, text.getvalue(), out)


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None:
    """Every test of this file."""


@pytest.mark.parametrize("task", list(vision_lora.TASKS))
def test_lora_learns_what_the_base_cannot_read(told: Told, task: str) -> None:
    assert told.scores["base on upright"] > 0.85
    assert told.scores[f"base on {task}"] < 0.3
    assert told.scores[f"lora on {task}"] > 0.6
    assert told.scores[f"full on {task}"] > 0.6


def test_the_adapter_is_of_the_convolutions_and_the_last_layer(told: Told) -> None:
    adapter = loralens.load(told.out / "turned")
    assert list(adapter) == list(vision_lora.TARGETS)
    assert adapter["conv2"].shape == (24, 12 * 9)
    assert adapter["conv2"].layout.kernel == (3, 3)
    assert told.scores["trained"] == sum(module.B.size + module.A.size for module in adapter.modules.values())
    assert told.scores["trained"] < told.scores["parameters"] / 4


def test_merged_weights_read_as_the_adapter_beside_the_base_does(told: Told) -> None:
    assert told.scores["merged on turned"] == pytest.approx(told.scores["lora on turned"], abs=1 / vision_lora.HELD_OUT)
    held_out = vision_lora.digits(vision_lora.TASKS["turned"])[1][0][:32]
    weights = told.out / "base" / "model.safetensors"
    merged = vision_lora.net(SMALL, told.out / "merged" / "model.safetensors")
    beside = vision_lora.net(SMALL, weights)
    with torch.no_grad(), vision_lora.Attachment(beside, loralens.load(told.out / "turned")).on():
        torch.testing.assert_close(merged(held_out), beside(held_out), rtol=1e-4, atol=1e-4)
    assert " exactly." in told.text


def test_unmerging_gives_the_base_back(told: Told) -> None:
    base, restored = (told.out / folder / "model.safetensors" for folder in ("base", "restored"))
    assert told.scores["restored"]
    assert base.read_bytes() == restored.read_bytes() != (told.out / "merged" / "model.safetensors").read_bytes()
