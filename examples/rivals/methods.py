"""Six ways to turn a small encoder into a classifier, as rows of one table: each row says what the method trains.

Three methods add parameters of a size that can be chosen; their sizes are as close to each other as possible. On the
six blocks of width 384 of MiniLM, without the head, LoRA r = 8 on query and value has 73,728 parameters, a prefix of 16
tokens 73,728, and bottlenecks of width 8 with their biases 78,432. BitFit has 26,112 and LoRA r = 8 on all linear
layers 337,920; these are not adjusted.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from loralens.errors import OptionError
from loralens.training import Injection, inject
from loralens.training.targets import ALL_LINEAR

HEAD = "classifier"
RANK, ALPHA = 8, 16.0
BOTTLENECK = 8
PREFIX = 16  # virtual tokens
ENDS = (".output.dense", ".self_attn.o_proj", ".mlp.down_proj")  # the last layers of attention and MLP: BERT, Llama
SPREAD = 0.01  # standard deviation of a bottleneck's initial weights: Houlsby et al. 2019, §3.6


@dataclass(frozen=True)
class Method:
    """One way to adapt a model; the head of a classifier is trained in each.

    Attributes
    ----------
    name, text, paper : str
    lr : float
        The learning rate, chosen among ``grid`` on the validation texts.
    grid : tuple of float
    prepare : callable
        Takes a model and a seed, changes the model, and returns the model to call in its place. Exactly those of its
        parameters require gradients that the method trains.
    targets : tuple of str or str, optional
        The targets of LoRA, which `loralens.training.fit` trains; None for other methods.
    """

    name: str
    text: str
    paper: str
    lr: float
    grid: tuple[float, ...]
    prepare: Callable[[nn.Module, int], nn.Module]
    targets: tuple[str, ...] | str | None = None

    def pair(self, seed: int) -> dict[str, Any]:
        """The arguments of `loralens.training.inject` and ``fit``."""
        return {"targets": self.targets, "rank": RANK, "alpha": ALPHA, "heads": [HEAD], "seed": seed}

    def injected(self, model: nn.Module, seed: int) -> Injection:
        """A model with the LoRA layers of this row."""
        return inject(model, **self.pair(seed))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, for all trained parameters."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def in_head(name: str) -> bool:
    """Whether a parameter belongs to the head."""
    return name.split(".")[0] == HEAD


def keep(model: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """Train the parameters whose names are wanted, and the head; no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(in_head(name) or wanted(name))
    return model


def full(model: nn.Module, seed: int) -> nn.Module:
    """Everything is trained."""
    del seed
    return keep(model, bool)


def biases(model: nn.Module, seed: int) -> nn.Module:
    """All biases are trained, including those of the LayerNorms; a linear layer that has none gets one of zeros.

    SmolLM2, like all models of Llama's architecture, has no biases, so that BitFit would train nothing there.
    """
    del seed
    add_biases(model)
    return keep(model, lambda name: name.rpartition(".")[2] == "bias")


def add_biases(model: nn.Module) -> None:
    """Give a bias of zeros to every linear layer without one, except for the layer that makes logits of words."""
    logits = getattr(model, "get_output_embeddings", lambda: None)()
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and layer.bias is None and layer is not logits:
            layer.bias = nn.Parameter(layer.weight.new_zeros(layer.out_features))


class Bottleneck(nn.Module):
    """A layer with output h, then h + U·gelu(D·h + b) + c with D (width, n) and U (n, width): Houlsby's adapter."""

    def __init__(self, layer: nn.Linear, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(layer.out_features, width)
        self.up = nn.Linear(width, layer.out_features)
        for part in (self.down, self.up):  # nearly zero, so that the model starts nearly unchanged
            nn.init.trunc_normal_(part.weight, std=SPREAD, a=-2 * SPREAD, b=2 * SPREAD, generator=generator)
            nn.init.zeros_(part.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The output, to which the block then adds the residual."""
        h: Tensor = self.layer(x)
        return h + self.up(gelu(self.down(h)))


def bottlenecks(model: nn.Module, seed: int) -> nn.Module:
    """Two bottlenecks in every block, after attention and MLP, as in Houlsby et al.; LayerNorms stay frozen."""
    generator = torch.Generator().manual_seed(seed)
    ends = [name for name, _ in model.named_modules() if name.endswith(ENDS)]
    for name in ends:
        before, _, own = name.rpartition(".")
        block = model.get_submodule(before)
        setattr(block, own, Bottleneck(getattr(block, own), BOTTLENECK, generator))
    added = tuple(f"{name}.{part}." for name in ends for part in ("down", "up"))
    return keep(model, lambda name: name.startswith(added))


def prefix(model: nn.Module, seed: int) -> nn.Module:
    """PEFT's prefix: keys and values of virtual tokens before every text, in every block, trained directly."""
    try:
        import peft
    except ImportError as error:
        raise OptionError(
            f"prefix tuning needs peft ({error})", fix="pip install peft, or leave prefix out of --methods"
        ) from error
    language = type(model).__name__.endswith("ForCausalLM")
    # PEFT calls a language model as a whole, and of a classifier its encoder.
    wants_cache(model if language else getattr(model, model.base_model_prefix))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 under transformers 5
        torch.manual_seed(seed)
        config = peft.PrefixTuningConfig(task_type="CAUSAL_LM" if language else "SEQ_CLS", num_virtual_tokens=PREFIX)
        made: nn.Module = peft.get_peft_model(model, config)  # trains a copy of the head
    return made


def wants_cache(backbone: nn.Module) -> None:
    """Let a model accept ``past_key_values``, which PEFT passes, if transformers 5 calls the argument ``cache``."""
    forward = backbone.forward
    if "past_key_values" in inspect.signature(forward).parameters:
        return

    def renamed(*inputs: Any, past_key_values: Any = None, **named: Any) -> Any:
        return forward(*inputs, cache=past_key_values, **named)

    backbone.forward = renamed


def lora(model: nn.Module, seed: int, *, name: str) -> nn.Module:
    """The model with the LoRA layers of the row of that name."""
    return method_named(name).injected(model, seed).model


# Learning rates were chosen by `python examples/alternatives.py --tune`: the rate of the grid with the best accuracy on
# the 640 validation texts of 20 Newsgroups. The comment beside a rate lists the accuracies of the grid, in its order,
# at seed 0 after 60 steps of 16 texts of 64 tokens.
METHODS: tuple[Method, ...] = (
    Method(
        "full",
        "full fine-tuning",
        "all weights",
        lr=2e-4,  # 0.467, 0.583, 0.561, 0.497
        grid=(1e-4, 2e-4, 5e-4, 1e-3),
        prepare=full,
    ),
    Method(
        "bitfit",
        "BitFit: biases",
        "Ben Zaken et al. 2022, arXiv:2106.10199",
        lr=2e-3,  # 0.142, 0.255, 0.580, 0.548, 0.564
        grid=(5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
        prepare=biases,
    ),
    Method(
        "bottleneck",
        f"bottleneck adapters, width {BOTTLENECK}, after attention and MLP",
        "Houlsby et al. 2019, arXiv:1902.00751",
        lr=2e-2,  # 0.503, 0.556, 0.613, 0.061
        grid=(5e-3, 1e-2, 2e-2, 5e-2),
        prepare=bottlenecks,
    ),
    Method(
        "prefix",
        f"prefix tuning, {PREFIX} tokens",
        "Li & Liang 2021, arXiv:2101.00190",
        lr=5e-2,  # 0.592, 0.653, 0.648, 0.642
        grid=(2e-2, 5e-2, 1e-1, 2e-1),
        prepare=prefix,
    ),
    Method(
        "lora",
        f"LoRA r = {RANK}, query and value",
        "Hu et al. 2021, arXiv:2106.09685",
        lr=1e-2,  # 0.502, 0.580, 0.119, 0.061
        grid=(5e-3, 1e-2, 2e-2, 5e-2),
        prepare=partial(lora, name="lora"),
        targets=("query", "value"),  # the paper's choice: the best for a given number of parameters (Table 5)
    ),
    Method(
        "lora-all",
        f"LoRA r = {RANK}, all linear layers",
        "Hu et al. 2021, arXiv:2106.09685",
        lr=5e-3,  # 0.281, 0.469, 0.523, 0.044
        grid=(1e-3, 2e-3, 5e-3, 1e-2),
        prepare=partial(lora, name="lora-all"),
        targets=ALL_LINEAR,
    ),
)


def method_named(name: str) -> Method:
    """The row of that name."""
    return next(method for method in METHODS if method.name == name)
