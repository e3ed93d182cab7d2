"""An adapter whose intruders were shrunk, of mixed ranks, in PEFT itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import loralens
from loralens.cli.main import main
from tests.marks import when_used
from tests.reference import intruder_scores, intruders_scaled
from tests.tolerances import MITIGATED, MOVED

torch = pytest.importorskip("torch")
peft = when_used("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("quiet_torch")

LLAMA: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 3, "lora_alpha": 7}


def llama() -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    )


def merged(model: Any) -> dict[str, np.ndarray]:
    state = model.double().merge_and_unload().state_dict()
    return {key.removesuffix(".weight"): W.numpy() for key, W in state.items()}


@pytest.mark.some(2)
@pytest.mark.parametrize(
    ("make", "config"),
    [(llama, LORA), (llama, {**LORA, "use_rslora": True}), (gpt2, {"target_modules": ["c_attn", "c_proj"], "r": 4})],
    ids=["llama", "rslora", "gpt2"],
)
@pytest.mark.parametrize("strength", [0.0, 0.75])
def test_peft_adds_exactly_the_edit(make: Any, config: dict[str, Any], strength: float, tmp_path: Path) -> None:
    model = peft.get_peft_model(make(), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            block = 0.02 if ".0." in name else 0.15  # so that modules differ in how many intruders they have
            parameter.data = block * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path / "adapter")
    make().save_pretrained(tmp_path / "base")
    arguments = ["intruders", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--no-cache"]
    result = CliRunner().invoke(main, [*arguments, "--remove", str(strength), "-o", str(tmp_path / "new")])
    assert result.exit_code == 0, result.stderr

    new = loralens.load(tmp_path / "new")
    assert len({module.rank for module in new.modules.values()}) > 1
    plain, before = make().state_dict(), merged(model)
    after = merged(peft.PeftModel.from_pretrained(make(), tmp_path / "new"))
    changed = 0
    for name in new:
        turn = (lambda X: X.T) if make is gpt2 else (lambda X: X)
        W, tuned, found = (turn(X) for X in (plain[f"{name}.weight"].double().numpy(), before[name], after[name]))
        s, scores = intruder_scores(W, tuned - W, 10)
        indices = np.flatnonzero(scores < 0.5)
        expected = intruders_scaled(W, tuned - W, indices, strength)
        assert np.abs(found - expected).max() < MITIGATED * s[0], name
        changed += indices.size > 0 and np.abs(found - tuned).max() > MOVED
    assert 0 < changed < len(new)
