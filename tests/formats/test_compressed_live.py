"""What `truncate` makes of every kind of adapter PEFT has, PEFT loads, and adds what the report says."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.ranks import Rule
from tests.compression.truncation import truncate
from tests.formats.test_peft_live import CASES, Case, adapt, answer, assert_same_updates, base, load_in_peft
from tests.marks import when_used
from tests.tolerances import LOSS_FLOAT32

peft = when_used("peft")

pytestmark = [
    pytest.mark.usefixtures("quiet_torch"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 3 LoRA tensor.s. have invalid shape"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module"),
]

BY_NAME = {case.name: case for case in CASES}


def saved(case: Case, folder: Path) -> loralens.Adapter:
    adapt(case).save_pretrained(folder)
    return loralens.load(folder)


@pytest.mark.some(4)
@pytest.mark.parametrize("rule", [Rule("energy", 0.6), Rule("rank", 1), Rule("parameters", 0.7)], ids=str)
@pytest.mark.parametrize(
    "name",
    ["llama", "rslora", "patterns", "gpt2", "conv", "words", "attention", "suffixes", "experts-reversed", "mixtral",
     "lora-bias", "saved", "tokens", "qwen3-moe", "dora"],
)  # fmt: skip
def test_peft_loads_mixed_ranks_and_adds_the_truncated_update(name: str, rule: Rule, tmp_path: Path) -> None:
    case = BY_NAME[name]
    after, found = truncate(saved(case, tmp_path / "before"), rule)
    loralens.save(after, tmp_path / "after")
    assert any(loss.rank_after < loss.rank_before for loss in found.values())
    model = load_in_peft(case, tmp_path / "after")
    assert_same_updates(after, model, case)


def test_outputs_move_by_what_the_report_says(tmp_path: Path) -> None:
    """One linear layer on white inputs: ‖(ΔW−ΔW')x‖² / ‖ΔWx‖² over an orthonormal basis of x is the error squared."""
    torch = pytest.importorskip("torch")
    case = BY_NAME["suffixes"]
    adapter = saved(case, tmp_path / "before")
    after, found = truncate(adapter, Rule("rank", 1))
    loralens.save(after, tmp_path / "after")
    x = torch.eye(6, dtype=torch.float64)
    outputs = []
    for model in (base(case), load_in_peft(case, tmp_path / "before"), load_in_peft(case, tmp_path / "after")):
        layer = dict(model.double().named_modules())
        name = next(key for key in layer if key in ("fc", "base_model.model.fc"))
        with torch.no_grad():
            outputs.append(layer[name](x).numpy())
    plain, before, now = outputs
    moved = np.linalg.norm(before - now) / np.linalg.norm(before - plain)
    assert moved == pytest.approx(found["fc"].relative_error, rel=1e-6)


def test_a_dropped_module_is_gone_from_the_configuration_too(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    adapter = saved(case, tmp_path / "before")
    gone = "model.layers.1.self_attn.v_proj"
    dead = loralens.LowRank(0 * adapter[gone].B, adapter[gone].A, adapter[gone].scale, scaling=adapter[gone].scaling)
    silent = type(adapter)(modules={**adapter.modules, gone: dead}, config=adapter.config, metadata=adapter.metadata)
    after = truncate(silent, Rule("rank", 4), drop_dead=True).adapter
    loralens.save(after, tmp_path / "after")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = load_in_peft(case, tmp_path / "after")
    assert not [one for one in said if "missing" in str(one.message)]  # of keys, as PEFT says it
    adapted = {key for key, _ in model.named_modules() if key.endswith("lora_A.default")}
    assert len(adapted) == 3
    assert not any(gone in key for key in adapted)
    loralens.save(silent, tmp_path / "silent")
    np.testing.assert_allclose(
        answer(model, case).numpy(), answer(load_in_peft(case, tmp_path / "silent"), case).numpy(), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:.*Refer to https")
def test_the_error_is_that_of_peft_s_own_truncation(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    adapter = saved(case, tmp_path / "one")
    nothing = adapter.map(lambda m: loralens.LowRank(0 * m.B, m.A, m.scale, scaling=m.scaling))
    loralens.save(nothing, tmp_path / "nothing")
    model = load_in_peft(case, tmp_path / "one").double()
    model.load_adapter(tmp_path / "nothing", adapter_name="nothing")
    model = model.double()
    model.add_weighted_adapter(["default", "nothing"], [1.0, 1.0], "small", combination_type="svd", svd_rank=2)
    found = truncate(adapter, Rule("rank", 2)).losses
    for name, module in adapter.items():
        layer = model.base_model.model.get_submodule(name)
        theirs = layer.get_delta_weight("small").detach().double().numpy()
        error = np.linalg.norm(module.dense() - theirs) / np.linalg.norm(module.dense())
        assert found[name].relative_error == pytest.approx(error, rel=LOSS_FLOAT32)
