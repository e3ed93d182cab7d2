"""PEFT as the judge of merged weights, and transformers as their reader; models are made here, tiny and random."""

import copy
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core import LazyArray
from tests.cli.test_merge import run
from tests.formats.test_peft_live import CASES, adapt, base
from tests.marks import slow_except, when_used
from tests.merging.merged import merge_all
from tests.models import llama
from tests.tolerances import MERGED_BY_PEFT

torch = pytest.importorskip("torch")
peft = when_used("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 3 LoRA tensor.s. have invalid shape"),  # biases on B
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]
LYING = {"gpt2", "bias-only"}


def arrays(model):
    """The state of a model as a checkpoint would hold it."""
    return {key: lazily(tensor) for key, tensor in model.state_dict().items()}


def lazily(tensor):
    import ml_dtypes

    wide = tensor.detach().clone()
    array = wide.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if wide.dtype == torch.bfloat16 else wide.numpy()
    return LazyArray.of(array)


def ours(adapter, state, case, dtype=None):
    """What we write, by key; everything else is the base's."""
    found = {key: tensor.read() for key, tensor in state.items()}
    return found | merge_all([(adapter, 1.0)], state, dtype=dtype, conv1d=case.name in LYING)


@pytest.mark.some(6)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_weight_is_what_peft_merges_to_a_rounding(case, tmp_path: Path) -> None:
    model = adapt(case)
    model.save_pretrained(tmp_path)
    adapter = loralens.load(tmp_path)
    theirs = copy.deepcopy(model).merge_and_unload().state_dict()
    before = arrays(base(case))
    found = ours(adapter, before, case)
    assert set(found) == set(theirs)
    changed = 0
    for key, tensor in theirs.items():
        array = tensor.detach().numpy()
        scale = max(np.abs(array).max(), 1e-30)
        np.testing.assert_allclose(found[key], array, rtol=0, atol=MERGED_BY_PEFT * scale, err_msg=key)
        changed += not np.array_equal(array, before[key].read())
    assert changed


@pytest.mark.parametrize("dtype", slow_except(["float32", "bfloat16", "float16"], "bfloat16"))
@pytest.mark.parametrize("use_dora", [False, True])
def test_what_peft_merges_is_rounded_and_less_of_it_is_not(dtype: str, use_dora: bool, tmp_path: Path) -> None:
    root = tmp_path / "base"
    llama().to(getattr(torch, dtype)).save_pretrained(root)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], use_dora=use_dora)
    adapted = peft.get_peft_model(llama(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(tmp_path / "adapter")
    codes = []
    for strength in (1, 0.8):
        model = transformers.AutoModelForCausalLM.from_pretrained(root, dtype=getattr(torch, dtype))
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        for layer in theirs.modules():
            if hasattr(layer, "scale_layer"):
                layer.scale_layer(strength)
        merged = tmp_path / f"merged{strength}"
        theirs.merge_and_unload().save_pretrained(merged)
        codes.append(run("verify", merged, "--base", root, "--adapter", tmp_path / "adapter").exit_code)
    assert codes == [0, 1]
