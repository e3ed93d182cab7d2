"""The loss of a causal language model in blocks of rows, so that its logits never exist as a whole.

The logits of a batch have as many numbers as it has tokens, times the vocabulary. A model computes them, converts them
to float32, and keeps both and their gradient. If the layer that makes them is frozen, the gradient of the loss in the
hidden states is all that the backward pass needs. It is computed with the loss, block by block, and positions that are
not predicted are left out.

The model itself is called as always. For the call, its output layer passes the hidden states on, and its loss function
computes the logits of a block at a time. What the model adds to the loss, such as that of a router, stays as it is.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from loralens.training.targets import output_embedding_of

# The most numbers in the logits of a block. On a CPU, with the head of SmolLM2, blocks of 2²¹, 2²², 2²³ and 2²⁴ take
# 1.10, 0.89, 0.85 and 0.91 of the time without blocks: small ones read the weight too often, large ones do not fit into
# the cache.
# A GPU needs more rows at a time for its products; that number is not measured.
BLOCKS = {"cpu": 2**23}
BLOCK = 2**26  # on any other device: 256 MiB in float32
PROBED = 4  # tokens with which a model is tried before the first batch
# Names of settings in transformers, and what each does to the logits. Anything else that a model does is unknown.
FINISHES: Mapping[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,  # Gemma 2
    "logit_scale": lambda logits, scale: logits * scale,  # Cohere
    "logits_scaling": lambda logits, scale: logits / scale,  # Granite
}
# In float16 the gradient of a sum over many tokens would need the scale of the run before it is stored. In float64 a
# model rounds its logits to float32. Blocks would round otherwise, and whoever computes in float64 compares digits.
DTYPES = (torch.float32, torch.bfloat16)


@final
@dataclass(frozen=True, slots=True)
class Ending:
    """How a model gets from its hidden states to its loss.

    Attributes
    ----------
    layer : nn.Linear
        The frozen layer that makes the logits.
    setting : str or None
        The name of what is done to the logits, a key of `FINISHES`.
    alone : bool
        Whether the loss of the model is that of the tokens and nothing else.
    """

    layer: nn.Linear
    setting: str | None
    alone: bool

    def finish(self, config: Any) -> Callable[[Tensor], Tensor] | None:
        """The function that is applied to the logits; None for none."""
        if self.setting is None:
            return None
        function, value = FINISHES[self.setting], getattr(config, self.setting)
        return lambda logits: function(logits, value)


# Model → what its trial has found; None if the model has to compute its loss itself.
_endings: WeakKeyDictionary[nn.Module, Ending | None] = WeakKeyDictionary()


@contextmanager
def loss_in_blocks(model: nn.Module, batch: Mapping[str, Any]) -> Iterator[Ending | None]:
    """Within the context the model computes its own loss in blocks of rows; its logits are of no use then.

    Gives None, and changes nothing, if the loss would not be the same: the model is not one of transformers that
    predicts the next token with its usual loss; the layer of the logits is trained, quantised, or has hooks; the
    logits are changed in a way that is not known; the model is compiled as a whole; or it computes in float16 or
    float64.
    """
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    ending = _ending_of(inner, batch)
    if ending is None:
        yield None
        return
    finish, hidden = ending.finish(_text_config(inner)), Hidden()

    def loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        del logits, vocab_size, kwargs
        if shift_labels is None:
            shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(hidden.states.device)
        # This waits for a GPU, once in a batch. Without it, prompts and padding would cost as much as answers.
        places = (targets != ignore_index).nonzero().squeeze(-1)
        rows = hidden.states.reshape(-1, hidden.states.shape[-1])[places]
        summed = sum_of_losses(rows, ending.layer, targets[places], finish)
        # The model's mean over nothing is NaN; 0 has the same gradients.
        return summed / (max(len(places), 1) if num_items_in_batch is None else num_items_in_batch)

    with _replacing(inner, ending.layer, hidden.keep, loss):
        yield ending


def sum_of_losses(
    rows: Tensor, layer: nn.Linear, targets: Tensor, finish: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The sum of −ln p of the targets, with gradients for the rows and none for the layer.

    Parameters
    ----------
    rows : tensor, shape (n, hidden)
    layer : nn.Linear
        The frozen layer from hidden states to logits.
    targets : tensor, shape (n,)
    finish : callable, optional
        What is done to the logits of the layer, number by number.
    """
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        # As autocast would, but the weight only once and not for every block.
        narrow = torch.get_autocast_dtype(kind)
        rows, weight, bias = rows.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    with torch.autocast(kind, enabled=False):
        summed: Tensor = _SumOfLosses.apply(rows, weight, bias, targets, finish)  # type: ignore[no-untyped-call]
    return summed


class _SumOfLosses(torch.autograd.Function):
    """The sum of the losses of rows, with the gradient of the rows computed beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        finish: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        summed = torch.zeros((), device=rows.device)
        size = max(1, BLOCKS.get(rows.device.type, BLOCK) // len(weight))
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            logits = nn.functional.linear(rows[part], weight, bias)
            ended = logits if finish is None else finish(logits)
            # In 16 bits a log-softmax loses its small differences.
            exact = ended.float()
            target = targets[part, None]
            norms = exact.logsumexp(-1, keepdim=True)
            summed += (norms - exact.gather(-1, target)).sum()
            if gradient is not None:
                # d(−ln p of the target)/d(logits) is softmax − 1 at the target.
                slope = exact.sub_(norms).exp_().scatter_add_(-1, target, torch.full_like(norms, -1.0))
                slope = slope.to(logits.dtype)
                if finish is not None:
                    slope = _through(finish, logits, slope)
                torch.mm(slope, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * above).to(gradient.dtype), None, None, None, None


def _through(finish: Callable[[Tensor], Tensor], logits: Tensor, slope: Tensor) -> Tensor:
    """The gradient in the logits of a layer, from that in the finished ones."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (before,) = torch.autograd.grad(finish(leaf), leaf, slope)
    return before


class Hidden:
    """Keeps the hidden states that reach the output layer."""

    def __init__(self) -> None:
        self.calls: list[Tensor] = []

    def keep(self, states: Tensor) -> Tensor:
        """Keep the hidden states; called in place of the output layer."""
        self.calls.append(states)
        return states

    @property
    def states(self) -> Tensor:
        """The hidden states of the last call."""
        return self.calls[-1]


def _ending_of(model: Any, batch: Mapping[str, Any]) -> Ending | None:
    """The ending of a model, found by a trial when it is first asked for; None where it is unknown."""
    layer, ids = output_embedding_of(model), batch.get("input_ids")
    if not (isinstance(ids, Tensor) and ids.ndim == 2 and len(ids)):
        return None
    if layer is None or not _has_usual_loss(model) or not _is_frozen_linear(layer):
        return None
    if torch.is_autocast_enabled(ids.device.type) and torch.get_autocast_dtype(ids.device.type) not in DTYPES:
        return None
    ending = _endings.get(model)
    if model not in _endings or (ending is not None and ending.layer is not layer):
        ending = _endings[model] = _try_model(model, layer, ids[:1, :PROBED])
    return ending


def _has_usual_loss(model: Any) -> bool:
    """Whether a model computes its loss by the function of transformers for causal language models."""
    config = getattr(model, "config", None)
    # A model that is compiled as a whole does not notice that something in it is replaced.
    if getattr(config, "is_encoder_decoder", True) or getattr(model, "_compiled_call_impl", None) is not None:
        return False
    # transformers' name for the loss. GPT-2 has None for it. Models of other libraries have no such attribute.
    if getattr(model, "loss_type", "") not in ("ForCausalLM", "ForConditionalGeneration", None):
        return False
    try:
        from transformers.loss.loss_utils import ForCausalLMLoss
    except ImportError:
        return False
    return model.loss_function is ForCausalLMLoss


def _is_frozen_linear(layer: nn.Module) -> bool:
    """Whether calling a layer is no more than a product with a frozen weight."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or layer.weight.dtype not in DTYPES:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and not any(parameter.requires_grad for parameter in layer.parameters())


def _try_model(model: Any, layer: nn.Module, ids: Tensor) -> Ending | None:
    """Call a model with a few tokens and made-up logits, and see what it does with them before its loss.

    The made-up logits reach from 0.001 to 1000, so that what is done to large logits alone is seen too.
    """
    designs: list[Tensor] = []
    arrived: list[tuple[Tensor, Any]] = []
    mean = torch.zeros((), device=ids.device)

    def make(states: Tensor) -> Tensor:
        sizes = torch.logspace(-3, 3, states.numel(), device=states.device)
        signs = torch.where(torch.arange(states.numel(), device=states.device) % 2 > 0, 1.0, -1.0)
        designs.append((sizes * signs).to(states.dtype).view(states.shape))
        return designs[-1].clone()

    def note_logits(logits: Tensor, labels: Any = None, vocab_size: Any = None, **kwargs: Any) -> Tensor:
        del labels, kwargs
        arrived.append((logits, vocab_size))
        return mean

    output = None
    devices = [ids.device] if ids.device.type == "cuda" else []
    # A model may need more inputs than these, or more logits than it has hidden states; its own loss is computed then.
    with (
        suppress(Exception),
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        _replacing(model, layer, make, note_logits),
    ):
        output = model(input_ids=ids, labels=ids)
    if output is None or len(designs) != 1 or len(arrived) != 1:
        return None
    (design,), ((logits, vocabulary),) = designs, arrived
    # Mixtral adds the loss of its router in place.
    alone = output.loss is mean and not mean.any()
    config = _text_config(model)
    # A router has a loss of its own, which does not depend on the logits; anything else is unknown.
    if vocabulary != layer.out_features or not (alone or getattr(config, "output_router_logits", False)):
        return None
    settings = [name for name in FINISHES if isinstance(getattr(config, name, None), float | int)]
    for setting in (None, *settings):
        ending = Ending(layer, setting, alone)  # type: ignore[arg-type]
        finish = ending.finish(config)
        expected = design if finish is None else finish(design)
        if logits.shape == design.shape and torch.equal(expected.to(logits.dtype), logits):
            return ending
    return None


def _text_config(model: Any) -> Any:
    """The configuration of the language model, which may be a part of that of the whole model."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def _replacing(model: Any, layer: nn.Module, forward: Callable[..., Any], loss: Callable[..., Any]) -> Iterator[None]:
    """Replace the output layer and the loss function of a model within the context."""
    # They are set on the instances; the classes keep the originals.
    own = model.__dict__.get("_loss_function")
    layer.__dict__["forward"] = forward
    model.__dict__["_loss_function"] = loss
    try:
        yield
    finally:
        del layer.__dict__["forward"]
        del model.__dict__["_loss_function"]
        if own is not None:
            model.__dict__["_loss_function"] = own
