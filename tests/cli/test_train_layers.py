"""``loralens train``: which layers are adapted, and with which ranks."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import loralens
from loralens.training.readout import record_of
from tests import models
from tests.cli.command import Command
from tests.formats.conftest import quiet_torch as quiet_torch  # a fixture: found here by its name

pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

TRAIN = Command("train", "--threads", "1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, quiet_torch: None) -> Path:
    home = tmp_path_factory.mktemp("home")
    models.folder(models.llama(), home / "llama")
    models.folder(models.wide_llama(), home / "wide")
    (home / "d.txt").write_text("\n".join(models.TEXTS * 3), encoding="utf-8")
    return home


def speak(home: Path, target: Path, *more: object, model: str = "llama") -> list[object]:
    files = ("--model", home / model, "--data", home / "d.txt", "--task", "causal-lm", "-o", target)
    return [*files, "--batch", 4, "--steps", 2, *more]


def test_layers_are_excluded_and_get_ranks_of_their_own(home: Path, tmp_path: Path) -> None:
    layers = ("--targets", "all-linear,embed_tokens", "--exclude", "o_proj,*.1.mlp", "--rank", 4)
    ranks = ("--rank-pattern", "down_proj=2", "--rank-pattern", "q_proj=12")
    result = TRAIN.good(*speak(home, tmp_path / "a", *layers, *ranks))
    assert "rank 2 to 12 in 10 modules" in result.stdout
    adapter = loralens.load(tmp_path / "a")
    assert {name.rpartition(".")[2]: module.rank for name, module in adapter.items()} == {
        "q_proj": 12, "k_proj": 4, "v_proj": 4, "gate_proj": 4, "up_proj": 4, "down_proj": 2, "embed_tokens": 4,
    }  # fmt: skip
    assert not any(".1.mlp" in name for name in adapter)
    run = json.loads((tmp_path / "a" / "run.json").read_text(encoding="utf-8"))
    assert (run["exclude"], run["rank_pattern"]) == (["o_proj", "*.1.mlp"], {"down_proj": 2, "q_proj": 12})


@pytest.mark.parametrize("text", ["q_proj", "q_proj=", "=3", "q_proj=x", "q_proj=-1"])
def test_a_rank_without_a_glob_or_a_number_is_refused(home: Path, tmp_path: Path, text: str) -> None:
    assert f"--rank-pattern {text!r} is not GLOB=R" in TRAIN.refused(
        *speak(home, tmp_path / "a", "--rank-pattern", text)
    )


def test_codes_without_bitsandbytes_or_in_shards_are_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    said = TRAIN.refused(*speak(home, tmp_path / "a", "--dtype", "nf4"))
    assert "a model in nf4 needs bitsandbytes" in said
    assert "pip install" in said
    assert "--shard cannot divide codes" in TRAIN.refused(*speak(home, tmp_path / "a", "--dtype", "nf4", "--shard"))


@pytest.mark.live
@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_a_base_is_coded_and_peft_loads_the_adapter(home: Path, tmp_path: Path, dtype: str) -> None:
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    more = ("--dtype", dtype, "--rank", 4, "--eval", home / "d.txt", "--lr", 0.02, "--steps", 6)
    said = TRAIN.told(*speak(home, tmp_path / "a", *more, model="wide"))
    assert said["evaluations"][-1]["loss"] < said["evaluations"][0]["loss"]
    record = record_of(loralens.load(tmp_path / "a")) or {}
    assert record["weights"] == dtype
    codes: dict[str, object] = {"load_in_8bit": True}
    if dtype == "nf4":
        codes = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(
        home / "wide", quantization_config=BitsAndBytesConfig(**codes), device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "a").train()
    ids = torch.tensor([[3, 4, 5, 6, 9, 4, 11]])
    with torch.no_grad():
        loss = theirs(input_ids=ids, labels=ids).loss
    assert float(loss) > 0


def test_an_evaluation_takes_as_many_texts_at_a_time_as_the_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralens.training.texts.tasks import Examples

    sizes: list[int] = []
    make = Examples.batch

    def recorded(examples: Examples, chosen: Sequence[int]) -> object:
        sizes.append(len(chosen))
        return make(examples, chosen)

    monkeypatch.setattr(Examples, "batch", recorded)
    TRAIN.good(*speak(home, tmp_path / "a", "--eval", home / "d.txt", "--rank", 2, "--accumulate", 2))
    assert max(sizes) == 2  # a batch of 4 in two parts
