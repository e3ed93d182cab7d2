"""Adapters that PEFT has saved, compressed and expanded, and loaded by PEFT again: its own ΔW has the printed error."""

import numpy as np
import pytest

from loralens.fleet.joint.code_group import FleetSource
from loralens.fleet.joint.compress import compress_fleet
from loralens.fleet.joint.expand import expand_adapter
from loralens.formats.records.fleets.reader import FleetFile
from tests import models

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
COUNT = 4
FORMS = {
    "plain": {"r": 4, "lora_alpha": 16},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"layer.0.attention.self.query": 2, "layer.1.attention.self.value": 3},
        "alpha_pattern": {"layer.1.attention.self.query": 5},
    },
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
}


def base():
    return models.bert("BertForSequenceClassification", num_labels=3)


def fill(model, seed):
    """Weights as after a training: A near a common start, B in a small common space, and a head of its own or a common
    one."""
    import torch

    shared, own = np.random.default_rng(0), np.random.default_rng(seed + 1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            value = shared.standard_normal(parameter.shape) + 0.02 * own.standard_normal(parameter.shape)
        elif "lora_B" in name:
            space = shared.standard_normal((parameter.shape[0], 2))
            value = space @ own.standard_normal((2, parameter.shape[1]))
        elif "magnitude" in name:
            value = own.uniform(0.5, 1.5, parameter.shape)
        elif "modules_to_save" in name:
            value = np.random.default_rng(7 if seed < 3 else 8).standard_normal(parameter.shape)
        else:
            continue
        parameter.data = torch.tensor(value, dtype=parameter.dtype)


def updates(model):
    from peft.tuners.lora import LoraLayer

    return {
        name: layer.get_delta_weight("default").detach().double().numpy()
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


@pytest.mark.parametrize("form", FORMS)
def test_peft_loads_expanded_adapters_with_the_printed_error(form, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    sources = []
    for i in range(COUNT):
        config = peft.LoraConfig(
            target_modules=["query", "value"], modules_to_save=["classifier"], task_type="SEQ_CLS", **FORMS[form]
        )
        model = peft.get_peft_model(base(), config)
        fill(model, i)
        model.save_pretrained(tmp_path / f"run{i}")
        sources.append(FleetSource(f"run{i}", str(tmp_path / f"run{i}")))
    result = compress_fleet([sources], tmp_path / "fleet.safetensors", error=0.15)
    assert [row.kind for row in result.adapters] == ["joint"] * COUNT
    file = FleetFile(tmp_path / "fleet.safetensors")
    tokens = torch.arange(10)[None]
    for row in result.adapters:
        expand_adapter(file, row.name, tmp_path / "out" / row.name)
        before = peft.PeftModel.from_pretrained(base(), tmp_path / row.name)
        after = peft.PeftModel.from_pretrained(base(), tmp_path / "out" / row.name)
        first, second = updates(before), updates(after)
        lost = sum(np.sum((first[name] - second[name]) ** 2) for name in first)
        measured = np.sqrt(lost / sum(np.sum(W**2) for W in first.values()))
        assert measured == pytest.approx(row.error, abs=1e-5)
        assert 0.01 < measured <= 0.15
        others = {name: p for name, p in before.named_parameters() if "lora_A" not in name and "lora_B" not in name}
        for name, parameter in after.named_parameters():
            # Heads, magnitudes and the base itself are as they were.
            assert name not in others or torch.equal(parameter, others[name])
        assert after(tokens).logits.shape == (1, 3)
        # A smaller rank loads, too, and its error is within the bound.
        cut = expand_adapter(file, row.name, tmp_path / "cut" / row.name, rank=2)
        third = updates(peft.PeftModel.from_pretrained(base(), tmp_path / "cut" / row.name))
        lost = sum(np.sum((first[name] - third[name]) ** 2) for name in first)
        assert np.sqrt(lost / sum(np.sum(W**2) for W in first.values())) <= cut.error_bound + 1e-5
