"""``train --backend trl``: the same run by TRL and PEFT as by our own loop, and what only TRL has."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import OptionError
from loralens.formats.records.training import log_entries
from loralens.training import record_of
from loralens.watching import read_watch_log
from tests import models
from tests.marks import slow_except

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore")]
TEXTS = [" ".join(models.WORDS[(3 * i + j * j) % len(models.WORDS)] for j in range(2 + i % 6)) for i in range(24)]


def run(base: Any, output: Path, backend: str | None = None, **options: Any) -> Any:
    given = {"rank": 2, "steps": 10, "batch": 4, "lr": 5e-3, "threads": 1, "targets": "*_proj", "data": TEXTS}
    return loralens.train(model=base, task="causal-lm", backend=backend, output=output, **{**given, **options})


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"accumulate": 2, "eval": TEXTS[:5], "evaluate_every": 5},
    "rslora": {"method": "rslora", "rank_pattern": "down_proj=4"},
    "dora": {"method": "dora", "optimiser": "sgd", "lr": 0.5},
    "lora+": {"method": "lora+", "schedule": "cosine"},
    "frozen-a": {"freeze_a": True, "weight_decay": 0.1},
    "gaussian": {"start": "gaussian", "clip": 0.1},
    "embedding": {"targets": "embed_tokens,q_proj", "optimiser": "sgd", "lr": 0.5},
    "pairs": {"data": [{"prompt": text, "completion": " the mat"} for text in TEXTS], "group_by_length": True},
    "in full": {"heads": "model.norm", "checkpointing": True},
    "bf16": {"dtype": "bf16"},
}


@pytest.mark.parametrize("name", slow_except(METHODS, "lora", "dora"))
def test_both_backends_take_the_same_steps(name: str, talking: Path, tmp_path: Path) -> None:
    ours, theirs = (run(talking, tmp_path / which, which, **METHODS[name]) for which in ("core", "trl"))
    tolerance = 2e-2 if name == "bf16" else 2e-5
    assert [*theirs.losses.values()] == pytest.approx([*ours.losses.values()], rel=tolerance)
    assert len(ours.losses) == 10
    assert [step for step, _ in theirs.evaluations] == [step for step, _ in ours.evaluations]
    assert record_of(theirs.adapter)["A0"] == record_of(ours.adapter)["A0"]
    assert list(theirs.adapter) == list(ours.adapter)
    if name not in ("bf16", "gaussian"):
        for module in ours.adapter:
            a, b = ours.adapter[module].dense(), theirs.adapter[module].dense()
            np.testing.assert_allclose(b, a, atol=2e-3 * np.abs(a).max())
    files = [{path.name for path in (tmp_path / which).iterdir()} for which in ("core", "trl")]
    assert files[0] == files[1]
    # The model is what the file says.
    options = {"model": talking, "task": "causal-lm", "data": METHODS[name].get("data", TEXTS), "threads": 1}
    if name == "lora":
        again = loralens.evaluate(tmp_path / "trl", **{**options, "data": TEXTS[:5]})
        assert again[str(tmp_path / "trl")]["loss"] == pytest.approx(theirs.evaluations[-1][1]["loss"], rel=1e-5)


def test_a_run_goes_on_with_the_same_bytes(talking: Path, tmp_path: Path) -> None:
    run(talking, tmp_path / "whole", "trl", warmup=0.0, save_every=4, snapshots=5, watch=5)
    run(talking, tmp_path / "parts", "trl", warmup=0.0, steps=6)
    result = run(talking, tmp_path / "parts", "trl", warmup=0.0, steps=None, more_steps=4)
    whole, parts = (tmp_path / name / "adapter_model.safetensors" for name in ("whole", "parts"))
    assert len(result.losses) == 10
    assert _numbers(whole) == _numbers(parts)
    steps = [entry["step"] for entry in log_entries(whole.parent / "log.jsonl") if "loss" in entry]
    assert steps == list(range(1, 11))
    watched, losses = read_watch_log(whole.parent / "watch.jsonl"), [*result.losses.values()]
    assert [snapshot.step for snapshot in watched] == [0, 5, 10]
    assert [snapshot.loss for snapshot in watched[1:]] == pytest.approx([sum(losses[:5]) / 5, sum(losses[5:]) / 5])


def _numbers(path: Path) -> dict[str, bytes]:
    from safetensors.numpy import load_file

    return {name: array.tobytes() for name, array in load_file(path).items()}


def test_a_model_of_the_caller_is_as_it_was(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = models.llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    run((model, models.tokenizer()), tmp_path / "a", "trl", steps=2)
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "forward" not in vars(model)


def test_an_adapter_is_gone_on_from(talking: Path, tmp_path: Path) -> None:
    first = run(talking, tmp_path / "first", "core", eval=TEXTS[:5])
    plain = {"rank": 8, "targets": ()}
    for which in ("core", "trl"):
        loaded = run(talking, tmp_path / which, which, start_from=tmp_path / "first", eval=TEXTS[:5], **plain)
        assert loaded.evaluations[0][1]["loss"] == pytest.approx(first.evaluations[-1][1]["loss"], rel=1e-5)
    with_a = [run(talking, tmp_path / f"a-{which}", which, first_a=tmp_path / "first") for which in ("core", "trl")]
    assert [*with_a[1].losses.values()] == pytest.approx([*with_a[0].losses.values()], rel=2e-5)


def test_dialogues_go_to_trl_and_can_be_packed(talking: Path, tmp_path: Path) -> None:
    talks = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ran"}]} for text in TEXTS
    ]
    result = run(talking, tmp_path / "a", data=talks, steps=3)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["backend"] == "trl"
    core = run(talking, tmp_path / "b", "core", data=talks, steps=3)
    assert [*result.losses.values()] == pytest.approx([*core.losses.values()], rel=2e-5)
    packed = run(talking, tmp_path / "c", data=talks, pack=True, length=40, steps=3, batch=2)
    assert len(packed.losses) == 3
    assert record_of(packed.adapter)["backend"] == "trl"


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_quantised_bases_are_trained_and_stay_as_they_are(dtype: str, tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    pytest.importorskip("trl")
    folder = tmp_path / "wide"
    models.folder(models.wide_llama(), folder)
    result = run(folder, tmp_path / "a", dtype=dtype, eval=TEXTS[:5], evaluate_every=1, steps=3)
    losses = [measures["loss"] for _, measures in result.evaluations]
    assert losses[-1] < losses[0]
    assert record_of(result.adapter)["weights"] == dtype
    assert {str(module.A.dtype) for module in result.adapter.modules.values()} == {"float32"}
    assert bnb
    assert f"dtype='{dtype}'" in _refused(folder, tmp_path / "b", "core", dtype=dtype)


def test_running_a_model_in_4_bits_on_a_cpu_leaves_its_codes(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    from loralens.verbs.models.models import load_headed

    models.folder(models.wide_llama(), tmp_path / "wide")
    loaded = load_headed(tmp_path / "wide", "AutoModelForCausalLM", device="cpu", dtype="nf4", threads=1)
    weight: Any = loaded.model.model.layers[0].mlp.up_proj.weight
    before = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    with torch.no_grad():
        loaded.model(input_ids=torch.tensor([[3, 4, 5]]))
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), before)


def _refused(base: Path, output: Path, backend: str | None, **options: Any) -> str:
    with pytest.raises(OptionError) as refused:
        run(base, output, backend, **options)
    return str(refused.value)


def test_what_a_backend_does_not_have_is_said(talking: Path, tmp_path: Path) -> None:
    assert "backend='trl' has no start='pissa'" in _refused(talking, tmp_path / "a", "trl", method="pissa")
    assert "backend='core' has no pack=True" in _refused(talking, tmp_path / "a", "core", pack=True)
    assert "pack=True and start='olora' exclude" in _refused(talking, tmp_path / "a", None, pack=True, start="olora")
    assert "nearest names are report_to" in _refused(talking, tmp_path / "a", "trl", trl="reports_to=wandb")
    assert "max_steps is not among" in _refused(talking, tmp_path / "a", "trl", trl="max_steps=7")
    assert "label_smoothing is not among" in _refused(talking, tmp_path / "a", "trl", trl="label_smoothing=0.1")
    assert "TRL refuses the run: " in _refused(talking, tmp_path / "a", "trl", trl="report_to=nothing")
    assert not (tmp_path / "a.unfinished").exists()
    run(talking, tmp_path / "b", trl=["neftune_noise_alpha=5", "report_to=none"], steps=2)
    # What is sent to services is asked for anew with every command.
    assert 'trl = {"neftune_noise_alpha" = 5}' in (tmp_path / "b" / "run.toml").read_text()
    run(talking, tmp_path / "again", None, trl=["loss_type=dft", "dataloader_num_workers=0"], steps=2)
    run(talking, tmp_path / "c", "trl", trl={"attn_implementation": "eager"}, steps=2)


def test_a_gradient_that_is_no_number_stops_the_run(talking: Path, tmp_path: Path) -> None:
    from loralens.errors import DivergenceError

    with pytest.raises(DivergenceError, match="at step"):
        run(talking, tmp_path / "a", "trl", optimiser="sgd", lr=1e30, clip=0.0, warmup=0.0)
    assert (tmp_path / "a.unfinished").is_dir()


def test_code_of_the_hub_never_runs() -> None:
    from loralens.verbs.models.models import load_headed

    with pytest.raises(loralens.OptionError, match="names code of the Hub"):
        load_headed("a", None, device="cpu", dtype="f32", threads=None, loading={"attn_implementation": "a/b"})
