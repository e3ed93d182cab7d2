"""The loss in blocks of rows: that of the model itself, with the same gradients, or the model's own computation."""

from collections.abc import Callable
from typing import Any

import pytest

from loralens.training.injection import inject
from loralens.training.losses import in_blocks
from loralens.training.losses.own_loss import own_loss
from loralens.training.texts.tasks import task_named
from tests import models

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY, TEXTS, LENGTH, IGNORED = 24, 4, 12, -100
ROWS = 5  # in a block, of the 33 that are predicted: the last block is shorter
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


def made(name: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{name}Config")(**SIZES, **changes)
    return models._seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config))


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    return models._seeded(lambda: transformers.GPT2LMHeadModel(config))


# The settings are such that leaving them out would change the loss of these tiny logits.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: made("Llama"),
    "tied": lambda: made("Llama", tie_word_embeddings=True),
    "gpt2": gpt2,
    "gemma": lambda: made("Gemma", head_dim=8),
    "softcapping": lambda: made("Gemma2", head_dim=8, final_logit_softcapping=0.1),
    "multiplied": lambda: made("Cohere", logit_scale=3.0),
    "divided": lambda: made("Granite", logits_scaling=0.2),
    "biased": lambda: made("Phi"),
    "router": lambda: made("Mixtral", output_router_logits=True),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(in_blocks.BLOCKS, "cpu", ROWS * VOCABULARY)


def texts(*, first: int = 7) -> dict[str, Any]:
    """Labels of which one text has few, and one has none."""
    ids = torch.randint(3, VOCABULARY, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :first], labels[2] = IGNORED, IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(model: Any, **options: Any) -> Any:
    """A model with factors that are not zero, so that all of them have gradients."""
    inject(model, **{"rank": 2, "targets": "all-linear", **options})
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=generator)
    return model


def gradients(model: Any, loss: Any) -> list[Any]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [g for g in torch.autograd.grad(loss, trained, allow_unused=True) if g is not None]


def close(ours: list[Any], theirs: list[Any], *, tolerance: float) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert float((mine - other).norm()) <= tolerance * float(other.norm()) + 1e-9


def runs_in_blocks(model: Any, batch: Any) -> bool:
    with in_blocks.loss_in_blocks(model, batch) as ending:
        return ending is not None


@pytest.mark.some(4)
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_its_gradients_are_those_of_the_model(name: str, autocast: bool) -> None:
    model, batch = adapted(MODELS[name]()), texts()
    count = int((batch["labels"][:, 1:] != IGNORED).sum())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert runs_in_blocks(model, batch)
        ours, over = own_loss(model, batch)
        theirs = model(**batch).loss * count
    assert int(over) == count
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    close(gradients(model, ours), gradients(model, theirs), tolerance=1e-4)


@pytest.mark.parametrize("name", ["llama", "softcapping", "router"])
def test_the_task_has_the_same_loss_as_its_logits_give(name: str) -> None:
    """Without the loss of a router, which the task leaves out."""
    model, batch = adapted(MODELS[name]()), texts()
    ours, count = task_named("causal-lm").loss(model, batch)
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    theirs = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, VOCABULARY), batch["labels"][:, 1:].flatten(), reduction="sum"
    )
    assert count == int((batch["labels"][:, 1:] != IGNORED).sum())
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    close(gradients(model, ours), gradients(model, theirs), tolerance=1e-4)


def test_nothing_of_the_size_of_the_logits_is_kept() -> None:
    model, batch, sizes = adapted(made("Llama")), texts(first=0), []
    batch["labels"] = batch["input_ids"].clone()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(tuple(t.shape)), t)[1], lambda t: t):
        own_loss(model, batch)
    assert not [shape for shape in sizes if VOCABULARY in shape and TEXTS * LENGTH - TEXTS in shape]
    assert (TEXTS * LENGTH - TEXTS, SIZES["hidden_size"]) in sizes  # the gradient of the hidden states


# Each class is made in a function, as the models of transformers take a second to import in every process.
def squared_llama() -> Any:
    """A model that does something unknown to its logits before the loss."""

    class SquaredLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any, labels: Any = None, **others: Any) -> Any:
            output = super().forward(input_ids, **others)
            output.logits = output.logits + 0.1 * output.logits**2
            output.loss = self.loss_function(output.logits, labels, VOCABULARY)
            return output

    return SquaredLlama


def regularised_llama() -> Any:
    """A model whose loss is more than that of its tokens."""

    class RegularisedLlama(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, input_ids: Any, labels: Any = None, **others: Any) -> Any:
            output = super().forward(input_ids, labels=labels, **others)
            output.loss = output.loss + output.logits.square().mean()
            return output

    return RegularisedLlama


def hooked() -> Any:
    model = adapted(made("Llama"))
    model.lm_head.register_forward_hook(lambda layer, inputs, logits: 2 * logits)
    return model


def of_class(kind: Any) -> Any:
    return adapted(models._seeded(lambda: kind(transformers.LlamaConfig(**SIZES))))


def own_function() -> Any:
    model = adapted(made("Llama"))
    model.loss_function = lambda logits, labels, vocab_size, **others: logits.square().mean()
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: adapted(made("Llama"), targets=["*_proj", "lm_head"]), id="adapted head"),
        pytest.param(lambda: adapted(made("Llama"), targets="*_proj", heads="lm_head"), id="trained head"),
        pytest.param(lambda: adapted(made("Llama").half()), id="float16"),
        pytest.param(hooked, id="hook"),
        pytest.param(own_function, id="own loss function"),
        pytest.param(lambda: of_class(squared_llama()), id="unknown logits"),
        pytest.param(lambda: of_class(regularised_llama()), id="more loss"),
    ],
)
def test_what_would_change_the_loss_is_computed_by_the_model(make: Callable[[], Any]) -> None:
    model, batch = make(), texts()
    assert not runs_in_blocks(model, batch)
    ours, count = own_loss(model, batch)
    assert float(ours.detach()) == pytest.approx(float((model(**batch).loss * count).detach()), rel=1e-6)
