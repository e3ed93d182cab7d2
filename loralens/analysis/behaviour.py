"""The effect of adapters on the outputs of a model: it is run on real inputs without adapters and with each."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import combinations
from math import inf, sqrt
from typing import TYPE_CHECKING, Any, final

from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, call, frozen_evaluation
from loralens.errors import MismatchError, OptionError, place

if TYPE_CHECKING:  # importing torch takes 1.4 s, and whoever passes a model has imported it
    from torch import Tensor, nn

BASE = "base"  # the name of the model without adapters, which therefore no adapter may have
# At a vocabulary of 10⁵, 1,000 tokens have 10⁸ logits, and one float64 copy of them would take 800 MB.
CHUNK = 1 << 22  # logits converted to float64 at a time: 32 MiB


@final
@dataclass(frozen=True, slots=True)
class Contrast:
    """The difference between the outputs of two versions of a model, over all positions that count.

    Attributes
    ----------
    first, second : str
        Names of adapters; ``base`` is the model without adapters.
    kl : float or None
        Mean KL(first ‖ second) of the output distributions softmax(logits), in nats, ≥ 0 up to rounding. This and the
        next two are None for a model without logits.
    logits : float or None
        Root mean square of the difference of the logits, in nats. The logits of every position are centred on 0 first,
        because a constant added to all of them changes no probability.
    agreement : float or None
        Share of the positions at which both have the same largest logit, in [0, 1].
    hidden : tuple of float
        √(Σ‖h₁ − h₂‖² / Σ‖h₁‖²) of the hidden states, one number for every layer that the model returns, from the
        embeddings to the output. Infinite if h₁ = 0 and h₂ is not.
    """

    first: str
    second: str
    kl: float | None
    logits: float | None
    agreement: float | None
    hidden: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True)
class Behaviour:
    """The effect of adapters on the outputs of a model on real inputs.

    Attributes
    ----------
    contrasts : tuple of Contrast
        The base against every adapter, then the adapters against each other, in the given order.
    positions : int
        The number of positions whose logits were compared: tokens, or inputs if the model gives one answer for each.
    states : int
        The number of positions whose hidden states were compared.
    left_out : mapping of str to mapping of str to str
        Adapter → part of its file that was not applied → reason.
    idle : mapping of str to tuple of str
        Adapter → the modules that the model never called.
    changed : mapping of str to tuple of str
        Adapter → the modules whose weight was changed in place, and so rounded to the dtype of the model.
    """

    contrasts: tuple[Contrast, ...]
    positions: int
    states: int
    left_out: Mapping[str, Mapping[str, str]]
    idle: Mapping[str, tuple[str, ...]]
    changed: Mapping[str, tuple[str, ...]]


def measure_behaviour(model: "nn.Module", batches: Iterable[Any], *, adapters: Mapping[str, Adapter]) -> Behaviour:
    """Measure what each adapter does to the outputs of its base, against the base and against the other adapters.

    Parameters
    ----------
    model : nn.Module
        The base model, of transformers or plain torch, without adapters. It is run in evaluation mode and restored
        afterwards. ``logits`` and ``hidden_states`` of its output are compared; a plain tensor counts as one hidden
        state.
    batches : iterable
        As in `loralens.compression.measure_moments`: an ``attention_mask`` says which positions count.
    adapters : mapping of str to Adapter
        Name → adapter. Updates are added as scale·B·A·x in float32, trained biases and heads replace those of the
        model, and DoRA is applied. Parts that have no equivalent in this model are listed in ``left_out``.

    Returns
    -------
    Behaviour

    Raises
    ------
    OptionError
        There are no batches or no adapters, an adapter is called "base", or the model returns neither logits nor hidden
        states.
    MismatchError
        The model carries PEFT adapters; an adapter does not fit the model, or changes the number of logits.

    Notes
    -----
    Every batch takes one forward pass of the base and one of each adapter. All outputs of a batch are in memory at the
    same time: (1 + adapters) · positions · vocabulary numbers. Distributions are compared in float64.
    """
    if not adapters or BASE in adapters:
        what = f"an adapter is called {BASE!r}" if adapters else "there are no adapters"
        raise OptionError(what, fix="give adapters, under other names")
    # A PEFT model applies its own adapters, so that none of its outputs would be that of the base.
    if hasattr(model, "peft_config"):
        raise MismatchError("the model carries PEFT adapters already", fix="give their base: model.unload()")
    attached: dict[str, Attachment] = {}
    for name, adapter in adapters.items():
        with place(name):
            attached[name] = Attachment(model, adapter)
    names = [BASE, *adapters]
    pairs = list(combinations(names, 2))
    sums: dict[tuple[str, str], _Difference] = {pair: _Difference() for pair in pairs}
    with frozen_evaluation(model, gradient=False):
        for batch in batches:
            # Each version is run once for a batch, whatever the number of pairs that it is in.
            outputs = {name: _output(model, batch, attached.get(name)) for name in names}
            for first, second in pairs:
                sums[first, second].add(outputs[first], outputs[second])
    counts = sums[pairs[0]]  # the same in every pair, because all see the same positions
    if not counts.states:
        raise OptionError("there are no inputs", fix="give at least one input")
    return Behaviour(
        contrasts=tuple(difference.contrast(*pair) for pair, difference in sums.items()),
        positions=counts.positions,
        states=counts.states,
        left_out={name: one.left_out for name, one in attached.items()},
        idle={name: tuple(module for module in one.hooked if module not in one.ran) for name, one in attached.items()},
        changed={name: one.changed for name, one in attached.items()},
    )


@final
@dataclass(frozen=True, slots=True)
class _Output:
    """The output of a model for a batch at the positions that count: logits (n, classes) and states (n, width)."""

    logits: "Tensor | None"
    hidden: "tuple[Tensor, ...]"


def _output(model: "nn.Module", batch: Any, attachment: Attachment | None) -> _Output:
    with attachment.on() if attachment else nullcontext():
        returned = call(model, batch)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    logits = getattr(returned, "logits", None)
    hidden = getattr(returned, "hidden_states", None)
    if hidden is None:
        # A model that returns no list of layers: its output is its only state.
        last = returned if hasattr(returned, "detach") else getattr(returned, "last_hidden_state", None)
        hidden = () if last is None else (last,)
    if logits is None and not hidden:
        raise OptionError(
            f"the model returns {type(returned).__name__}, without logits or hidden states",
            fix="give a model whose output has them, or is a tensor",
        )
    return _Output(
        None if logits is None else _select_positions(logits, mask),
        tuple(_select_positions(state, mask) for state in hidden),
    )


def _select_positions(values: "Tensor", mask: "Tensor | None") -> "Tensor":
    """The rows of a tensor (batch, length, n) at the positions that count; all rows of any other tensor."""
    # A classifier has one row of logits for each input, to which a mask over tokens does not apply.
    if mask is not None and mask.ndim == 2 and values.shape[:2] == mask.shape and values.ndim == 3:
        return values[mask.bool().to(values.device)]
    return values.reshape(-1, values.shape[-1])


def sum_divergences(first: "Tensor", second: "Tensor") -> float:
    """Σ KL(softmax(first) ‖ softmax(second)) over the rows, in nats, computed in float64.

    Logits or logarithms of probabilities, shape (n, outcomes). Rounding to float32 would make the divergence of two
    almost equal models negative, since differences of probabilities of either sign cancel to first order.
    """
    rows, total = max(1, CHUNK // first.shape[-1]), 0.0
    for start in range(0, len(first), rows):
        p, q = (_double(logits[start : start + rows]).log_softmax(-1) for logits in (first, second))
        total += float((p.exp() * (p - q)).sum())
    return total


@final
class _Difference:
    """Sums over batches, from which a `Contrast` is computed."""

    def __init__(self) -> None:
        self.positions = self.states = 0
        self.kl = self.squares = 0.0
        self.same = 0
        self.distance: list[float] = []
        self.length: list[float] = []

    def add(self, first: _Output, second: _Output) -> None:
        """Add the outputs of one batch."""
        if first.logits is not None and second.logits is not None:
            self._add_logits(first.logits, second.logits)
        if not self.distance:  # the number of layers is known from the first batch on
            self.distance, self.length = [0.0] * len(first.hidden), [0.0] * len(first.hidden)
        for layer, (h1, h2) in enumerate(zip(first.hidden, second.hidden, strict=True)):
            h1 = _double(h1)
            self.distance[layer] += float((h1 - _double(h2)).square().sum())
            # The distance is relative to the first version, which is the base in the pairs with the base.
            self.length[layer] += float(h1.square().sum())
        self.states += len(first.hidden[0]) if first.hidden else len(first.logits)  # type: ignore[arg-type]

    def _add_logits(self, first: "Tensor", second: "Tensor") -> None:
        if first.shape != second.shape:
            raise MismatchError(
                f"one version gives {first.shape[-1]} logits and the other {second.shape[-1]}",
                fix="compare adapters of one task, on a model with its head",
            )
        self.kl += sum_divergences(first, second)
        rows = max(1, CHUNK // first.shape[-1])
        for start in range(0, len(first), rows):
            x, y = (_double(logits[start : start + rows]) for logits in (first, second))
            # Centred, because only the differences between logits decide the probabilities.
            difference = (x - x.mean(-1, keepdim=True)) - (y - y.mean(-1, keepdim=True))
            self.squares += float(difference.square().mean(-1).sum())
            self.same += int((x.argmax(-1) == y.argmax(-1)).sum())
        self.positions += len(first)

    def contrast(self, first: str, second: str) -> Contrast:
        """The means over all batches so far."""
        n = self.positions
        hidden = tuple(
            sqrt(distance / length) if length else (inf if distance else 0.0)
            for distance, length in zip(self.distance, self.length, strict=True)
        )
        if not n:
            return Contrast(first, second, None, None, None, hidden)
        return Contrast(first, second, self.kl / n, sqrt(self.squares / n), self.same / n, hidden)


def _double(values: "Tensor") -> "Tensor":
    """Float64; on the CPU where the device has none."""
    return (values.cpu() if values.device.type == "mps" else values).double()
