"""Injection and removal: what is adapted, what is trained, and that the model comes back as it was."""

from collections.abc import Sequence
from typing import Any

import pytest

from loralens import OptionError
from loralens.training import METHODS, inject
from tests import models
from tests.training.conftest import holder, random_gradients, randomise

torch = pytest.importorskip("torch")
nn = torch.nn

NAMES = [method.name for method in METHODS]


def bits(model: nn.Module) -> dict[str, Any]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def train(made: Any, *, steps: int = 2, seed: int = 0) -> None:
    """A few steps of AdamW with weight decay on next-token prediction."""
    ids = torch.randint(2, 24, (2, 7), generator=torch.Generator().manual_seed(seed))
    optimiser = torch.optim.AdamW(made.groups(lr=1e-2), weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        made.model(input_ids=ids, labels=ids).loss.backward()
        optimiser.step()


@pytest.mark.parametrize("method", NAMES)
def test_only_factors_and_magnitudes_change_and_removal_gives_the_model_back(method: str) -> None:
    model = models.llama().train()
    model.model.norm.weight.requires_grad_(False)
    before, objects = bits(model), dict(model.named_modules())
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    made = inject(model, targets=["*_proj", "embed_tokens"], rank=2, method=method, gradients=random_gradients)
    trained = {id(parameter) for parameter in made.parameters}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trained
    start = {name: [p.clone() for p in layer.parameters(recurse=False)] for name, layer in made.layers.items()}
    train(made)
    for name, layer in made.layers.items():
        for one, old in zip(layer.parameters(recurse=False), start[name], strict=True):
            assert torch.equal(one, old) != one.requires_grad, name
    assert same(before, {key.replace(".base_layer", ""): t for key, t in bits(model).items() if _is_base(key)})
    made.remove()
    assert same(before, bits(model))
    assert dict(model.named_modules()) == objects  # by identity: modules compare no other way
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == wanted
    made.remove()  # once more changes nothing
    assert dict(model.named_modules()) == objects


def _is_base(key: str) -> bool:
    return key.rpartition(".")[2] not in ("A", "B", "magnitude", "A0", "B0")


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        ("q_proj", 2),
        (["q_proj", "model.layers.1.*.down_proj"], 3),
        ("*.self_attn.[qv]_proj", 0),  # brackets are literal, as everywhere in loralens
        ("*", 16),
        (["lm_head"], 1),
        ("*embed*", 1),
    ],
)
def test_targets(targets: str | Sequence[str], count: int) -> None:
    if not count:
        with pytest.raises(OptionError, match=r"no module matches"):
            inject(models.llama(), targets=targets)
        return
    assert len(inject(models.llama(), targets=targets, rank=2).layers) == count


def test_all_linear_means_conv1d_too_and_not_the_head() -> None:
    assert list(inject(models.gpt2(), rank=2).layers) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "q_porj"}, r"no module matches 'q_porj'\n  fix: the nearest names are q_proj"),
        ({"targets": []}, "no targets"),
        ({"targets": "*.input_layernorm"}, "a LlamaRMSNorm of transformers.*, which cannot be adapted"),
        ({"rank": 0}, "rank 0"),
        ({"rank": 17}, "rank 17 is larger than the matrix of any target allows"),
        ({"alpha": 0}, "alpha 0"),
        ({"alpha": 1e300}, r"alpha 1e\+300 is not a positive number with a scale that float32 holds"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"seed": "a"}, "seed 'a' is not a whole number"),
        ({"method": "lroa"}, r"'lroa' is not a training method\n  fix: .*nearest: lora"),
        ({"heads": ["score"]}, "no module matches 'score'"),
        ({"targets": "lm_head", "heads": ["lm_head"]}, "both adapted and trained in full"),
    ],
)
def test_refusals_leave_the_model_as_it_was(options: dict[str, Any], message: str) -> None:
    model = models.llama()
    before, objects = bits(model), dict(model.named_modules())
    with pytest.raises(OptionError, match=message):
        inject(model, **options)
    assert same(before, bits(model))
    assert dict(model.named_modules()) == objects
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(models.llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(OptionError, match="wrapped by PEFT"):
        inject(model)


def test_groups_of_lora_plus() -> None:
    made = inject(models.llama(), targets=["q_proj", "embed_tokens"], rank=2, method="lora+", heads=["lm_head"])
    groups = {group["name"]: (group["lr"], len(group["params"])) for group in made.groups(lr=1e-3)}
    assert groups == {"A": (1e-3, 4), "B": (16e-3, 2), "heads": (1e-3, 1)}
    assert {group["name"] for group in inject(holder("linear"), rank=2, method="dora").groups(lr=1)} == {
        "A", "B", "magnitude",
    }  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "pissa"])
def test_tied_weights_stay_tied(method: str) -> None:
    model = models.llama(tie_word_embeddings=True)
    weight = model.model.embed_tokens.weight
    assert model.lm_head.weight is weight
    before = weight.clone()
    made = inject(model, targets=["lm_head", "embed_tokens"], rank=2, method=method)
    train(made)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    made.remove()
    assert model.lm_head.weight is model.model.embed_tokens.weight is weight
    assert torch.equal(weight, before)


def test_a_layer_in_two_places_is_adapted_in_both() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    first = model[0]
    made = inject(model, targets="0", rank=2)
    assert model[0] is model[2] is made.layers["0"]
    made.remove()
    assert model[0] is model[2] is first


def test_a_head_with_a_tied_weight_is_refused_alone() -> None:
    model = models.llama(tie_word_embeddings=True)
    with pytest.raises(OptionError, match=r"lm_head.weight is tied to model.embed_tokens.weight"):
        inject(model, targets="q_proj", rank=2, heads=["lm_head"])
    assert set(inject(model, targets="q_proj", rank=2, heads=["lm_head", "embed_tokens"]).heads) == {
        "lm_head", "model.embed_tokens",
    }  # fmt: skip


def test_running_statistics_stay_frozen_and_those_of_heads_do_not() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4)))
    model[1].running_mean += 1
    before, x = bits(model), torch.randn(3, 2, 9)
    made = inject(model, targets="0", rank=2, heads=["2"])
    randomise(made)
    outputs = [made.layers["0"](x), model[:2](x)]
    torch.testing.assert_close(outputs[1], (outputs[0] - 1) / (1 + model[1].eps) ** 0.5)
    model(x)
    assert model.training
    model.train()
    model(x)
    after = bits(model)
    assert same({key: before[key] for key in before if key[0] == "1"}, {k: after[k] for k in after if k[0] == "1"})
    assert not torch.equal(after["2.0.running_mean"], before["2.0.running_mean"])
    made.remove()
    assert same(before, bits(model))
    model(x)
    assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_evaluation_of_torchs_own_encoder_sees_the_adapter() -> None:
    """Its fast path reads weights and calls no layer; a model with our layers must not take it."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)
    made = inject(model, targets=["linear1", "linear2"], rank=2)
    randomise(made)
    x = torch.randn(2, 3, 8)
    wanted = model.train()(x)
    model.eval()
    for mask in (None, torch.tensor([[False, False, False], [False, False, True]])):
        with torch.no_grad():
            found = model(x, src_key_padding_mask=mask)
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
    made.remove()
    assert model.use_nested_tensor
