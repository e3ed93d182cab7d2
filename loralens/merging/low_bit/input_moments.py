"""Measuring the second moments H = E[x xᵀ] of the inputs of a model's linear layers.

Layers that read the same input (q, k and v; gate and up) share one matrix. All matrices together are as large as the
weights or larger, so the model runs several times if they do not fit into memory, each time for some of them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.attached import call, first_input, frozen_evaluation
from loralens.core.lazy import Array
from loralens.errors import OptionError

if TYPE_CHECKING:  # importing torch takes 1.4 s, and whoever passes a model has imported it
    from torch import Tensor, nn

Batches = Callable[[], Iterable[tuple[Any, float]]]  # batches with the weight of each of their positions


@final
@dataclass(frozen=True, slots=True)
class SharedInputs:
    """The distinct inputs of the linear layers of a model.

    Attributes
    ----------
    inputs : mapping of str to str
        Name of a layer → name of the first layer that reads the same input.
    widths : mapping of str to int
        Name of a first layer → the width n of its input, in the order in which the model runs.
    """

    inputs: Mapping[str, str]
    widths: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """The bytes of all matrices in float32."""
        return sum(4 * width**2 for width in self.widths.values())

    def readers(self, name: str) -> int:
        """The number of layers that read the input of a first layer."""
        return sum(first == name for first in self.inputs.values())

    def passes(self, budget: int) -> list[list[str]]:
        """The first layers in groups whose matrices take at most ``budget`` bytes, but at least one in each."""
        groups: list[list[str]] = []
        taken = budget
        for name, width in self.widths.items():
            nbytes = 4 * width**2
            if not groups or taken + nbytes > budget:
                groups.append([])
                taken = 0
            groups[-1].append(name)
            taken += nbytes
        return groups


def linear_layers(model: "nn.Module") -> dict[str, "nn.Module"]:
    """The linear layers of a model by name, without the head, which is as a rule neither adapted nor quantised."""
    from torch import nn

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}


def find_shared_inputs(model: "nn.Module", batch: Any, names: Sequence[str]) -> SharedInputs:
    """Run the model once and see which of the named linear layers read the same input.

    A layer that this batch does not reach (an expert that no token chose) is counted as a layer with an input of its
    own.
    """
    layers = linear_layers(model)
    first_readers: dict[tuple[Any, ...], str] = {}
    alive: list[Tensor] = []  # so that no later tensor gets the memory of an earlier one
    inputs: dict[str, str] = {}
    widths: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if name in inputs:
                return
            x = first_input(args, kwargs)
            alive.append(x)
            place = (x.data_ptr(), tuple(x.shape), x.stride(), x.device)
            inputs[name] = first_readers.setdefault(place, name)
            if inputs[name] == name:
                widths[name] = int(x.shape[-1])

        return look

    with frozen_evaluation(model, gradient=False), ExitStack() as stack:
        for name in names:
            stack.callback(layers[name].register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        call(model, batch)
    for name in names:
        if name not in inputs:
            inputs[name], widths[name] = name, int(layers[name].in_features)  # type: ignore[arg-type]
    return SharedInputs(inputs, widths)


def measure_inputs(
    model: "nn.Module", batches: Batches, shared: SharedInputs, *, budget: int, put: Callable[[str, Array, int], None]
) -> None:
    """Measure H of every distinct input, and give each to ``put`` with the number of its positions.

    Parameters
    ----------
    model : nn.Module
    batches : callable
        Gives the inputs of the model, each with the weight w of its positions, from the beginning whenever it is
        called. H = Σ w·x xᵀ / Σ w.
    shared : SharedInputs
    budget : int
        Bytes that the matrices may take at a time. The model runs once for each of ``shared.passes(budget)``.
    put : callable
        Takes the name of a first layer, H (n, n), float32, and the number of positions.
    """
    layers = linear_layers(model)
    for group in shared.passes(budget):
        sums = {name: _Sum() for name in group}
        with frozen_evaluation(model, gradient=False), ExitStack() as stack:
            for name, total in sums.items():
                stack.callback(layers[name].register_forward_pre_hook(total.hook, with_kwargs=True).remove)
            empty = True
            for batch, weight in batches():
                empty = False
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                for total in sums.values():
                    total.begin(mask if mask is not None and mask.ndim == 2 else None, weight)
                call(model, batch)
        if empty:
            raise OptionError("there are no texts to calibrate on", fix="give at least one text")
        for name in group:
            put(name, sums[name].mean(shared.widths[name]), sums[name].count)
            # Each sum is freed at once, so that at most one copied matrix is in memory beside the sums.
            del sums[name]


@final
class _Sum:
    """Σ w·x xᵀ over the positions of one layer, float32."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | None = None
        self._weights = 0.0
        self._mask: Tensor | None = None
        self._weight = 1.0

    def begin(self, mask: "Tensor | None", weight: float) -> None:
        """Take the mask and the weight of the next batch."""
        self._mask, self._weight = mask, weight

    def hook(self, _: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add the inputs of one call of the layer."""
        x = first_input(args, kwargs).detach()
        rows, mask = x.reshape(-1, x.shape[-1]), self._mask
        # Some models flatten (batch, length) before a module; a module that sees other positions is counted whole.
        if mask is not None and (x.shape[:-1] == mask.shape or x.shape[:-1] == (mask.numel(),)):
            rows = rows[mask.reshape(-1).bool().to(rows.device)]
        rows = rows.float()
        if self._total is None:
            self._total = rows.new_zeros(rows.shape[-1], rows.shape[-1])
        self._total.addmm_(rows.T, rows, alpha=self._weight)
        self._weights += self._weight * len(rows)
        self.count += len(rows)

    def mean(self, width: int) -> Array:
        """H; 0 where no position reached the layer."""
        if self._total is None:
            return np.zeros((width, width), np.float32)
        return np.asarray(self._total.div_(self._weights).cpu().numpy())


def both_halves(
    first: Iterable[Any], second: Iterable[Any], weights: tuple[float, float]
) -> Iterator[tuple[Any, float]]:
    """The batches of two parts, each with the weight of its positions."""
    yield from ((batch, weights[0]) for batch in first)
    yield from ((batch, weights[1]) for batch in second)
