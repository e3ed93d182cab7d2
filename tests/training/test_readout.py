"""The adapter that is read back: PEFT loads it and computes the same, and so do our own tools."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.core import Attachment
from loralens.training import METHODS, Injection, inject, read_injection
from tests import models
from tests.marks import when_used
from tests.tolerances import ATTACHED, TRAINED_LIVE
from tests.training.conftest import KINDS, holder, injected, random_gradients, randomise

torch = pytest.importorskip("torch")
peft = when_used("peft")

NAMES = [method.name for method in METHODS]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]


def loaded_by_peft(folder: Path, base: Any) -> Any:
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def close(found: Any, wanted: Any, tolerance: Any = TRAINED_LIVE) -> None:
    np.testing.assert_allclose(found.detach().double().numpy(), wanted.detach().double().numpy(), **tolerance)


@pytest.mark.some(12)
@pytest.mark.parametrize("method", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_on_the_original_base(kind: str, method: str, tmp_path: Path) -> None:
    made, x = injected(kind, method=method), KINDS[kind][1]()
    loralens.save(read_injection(made), tmp_path / "a")
    theirs = loaded_by_peft(tmp_path / "a", holder(kind))
    assert (theirs(x) - holder(kind)(x)).abs().max() > 0.1
    close(theirs(x), made.model(x))


def llama_trained(**options: Any) -> tuple[Injection, Any]:
    made = inject(
        models.llama().double(),
        rank=3,
        **{"targets": ["*_proj", "lm_head"], "gradients": random_gradients, **options},
    )
    randomise(made)
    return made, torch.tensor([[3, 4, 5, 9]])


@pytest.mark.some(2)
@pytest.mark.parametrize("method", NAMES)
def test_whole_models_are_read_written_and_loaded(method: str, tmp_path: Path) -> None:
    made, ids = llama_trained(method=method)
    with torch.no_grad():
        wanted = made.model(input_ids=ids).logits
    adapter = read_injection(made, base_model="tiny/llama")
    assert adapter.parameters == made.trainable * (2 if made.method.subtracted else 1) - _magnitudes(made) + _frozen(
        made
    )
    loralens.save(adapter, tmp_path / "a")
    back = loralens.load(tmp_path / "a")
    assert back.base_model == "tiny/llama"
    assert {finding.code for finding in back.findings} == ({"use-dora"} if method == "dora" else set())
    for name, module in adapter.items():
        assert np.array_equal(back[name].B, module.B)
        assert np.array_equal(back[name].A, module.A)
        assert back[name].scale == module.scale == made.layers[name].scale
    made.remove()
    with torch.no_grad():
        close(loaded_by_peft(tmp_path / "a", made.model)(input_ids=ids).logits, wanted)
        attachment = Attachment(made.model, back)
        assert not attachment.left_out
        with attachment.on():
            close(made.model(input_ids=ids).logits, wanted)


def _magnitudes(made: Injection) -> int:
    return sum(layer.magnitude.numel() for layer in made.layers.values() if layer.magnitude is not None)


def _frozen(made: Injection) -> int:
    return sum(layer.A.numel() for layer in made.layers.values() if not layer.A.requires_grad)


def test_pissa_is_a_plain_lora_of_twice_the_rank_on_the_base_as_it_was() -> None:
    made = injected("linear", method="pissa", random=False)
    layer = made.layers["net.layer"]
    close(
        torch.from_numpy(read_injection(made)["net.layer"].dense()), torch.zeros(5, 6), ATTACHED
    )  # nothing is learnt yet
    W = holder("linear").net.layer.weight
    randomise(made)
    module = read_injection(made)["net.layer"]
    assert (module.rank, module.scaling.alpha, module.scale) == (6, 10.0, 5 / 3)
    residual = W - layer.scale * layer.B0 @ layer.A0
    close(torch.from_numpy(module.dense()) + W, residual + layer.scale * layer.B @ layer.A, ATTACHED)


def test_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    model = models.bert("BertForSequenceClassification")
    base = copy.deepcopy(model)
    made = inject(model, targets=["query", "value"], rank=2, heads=["classifier"])
    randomise(made)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.add_(1)
    ids = torch.tensor([[3, 4, 5, 9]])
    loralens.save(read_injection(made), tmp_path / "a")
    back = loralens.load(tmp_path / "a")
    assert {(e.role, e.module, e.parameter) for e in back.extra.values()} == {
        ("saved", "classifier", "weight"), ("saved", "classifier", "bias"),
    }  # fmt: skip
    close(loaded_by_peft(tmp_path / "a", base)(input_ids=ids).logits, made.model(input_ids=ids).logits)
