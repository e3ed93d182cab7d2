"""``loralens.calibrate``: paths and objects, one result, the command's numbers, and nothing written unasked."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Moments, load_moments
from tests import models
from tests.bases import contents
from tests.cli.command import Command
from tests.tolerances import MOMENTS_32

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.usefixtures("quiet_torch")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    """A causal language model, an adapter for it, and texts."""
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.saved(models.adapter(models.llama(), ("q_proj", "down_proj")), home / "adapter")
    models.jsonl(home / "texts.jsonl")
    return home


def same(moments: Moments, other: Moments, tolerance: float) -> None:
    assert list(moments) == list(other)
    assert moments.fingerprint == other.fingerprint
    for name, moment in moments.items():
        assert moment.count == other[name].count
        np.testing.assert_allclose(moment.K, other[name].K, rtol=tolerance, atol=tolerance)


def test_paths_objects_and_the_command_measure_the_same(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "stats.safetensors"
    arguments = ["--adapter", home / "adapter", "--model", home / "llama", "--data", home / "texts.jsonl"]
    record = Command("calibrate", "--threads", "1").told(*arguments, "-o", target)
    by_path = loralens.calibrate(home / "adapter", model=home / "llama", data=home / "texts.jsonl", threads=1)
    model, tokenizer = models.llama(), models.tokenizer()
    by_object = loralens.calibrate(
        loralens.load(home / "adapter"), model=(model, tokenizer), data=list(models.TEXTS), threads=1
    )
    assert by_path.moments is not None
    assert by_object.moments is not None
    same(by_path.moments, load_moments(target), 0)
    same(by_object.moments, by_path.moments, MOMENTS_32)
    assert {**by_path.record(), "target": str(target), "loralens": loralens.__version__} == record
    assert by_object.record()["source"]["data"] == "texts"


def test_without_output_nothing_is_written(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(home)
    result = loralens.calibrate(home / "adapter", model=home / "llama", data=home / "texts.jsonl")
    assert contents(home) == before
    assert not list(tmp_path.iterdir())
    assert result.record()["target"] is None
    assert result.conclusion() == ["Measured the moments of 4 modules over 25 positions of 4 texts."]
    smaller = loralens.compress(home / "adapter", rank=1, activations=result.moments)
    assert smaller.data_error is not None


def test_a_model_of_peft_carries_its_adapter(home: Path) -> None:
    peft = pytest.importorskip("peft")
    carrying = peft.PeftModel.from_pretrained(models.llama(), home / "adapter")
    result = loralens.calibrate(home / "adapter", model=(carrying, models.tokenizer()), data=home / "texts.jsonl")
    plain = loralens.calibrate(home / "adapter", model=home / "llama", data=home / "texts.jsonl")
    assert result.moments is not None
    assert plain.moments is not None
    same(result.moments, plain.moments, MOMENTS_32)
