"""Calibration: a model is run over real inputs, and what they excite in an adapter's bottlenecks is summed up."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, Tree, call, first_input, still
from loralens.core.fingerprint import fingerprint
from loralens.core.layers import Steps, steps
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.moments import Moment, Moments
from loralens.core.structured import Update
from loralens.errors import MismatchError, OptionError, place

if TYPE_CHECKING:  # 1.4 s: torch is here when a model is
    from torch import Tensor, nn

    from loralens.core.attached import Watch

    Loss = Callable[[Any, Any], Tensor]

SAME = 1e-2  # relative distance of a factor as PEFT holds it from that given: bfloat16 and nothing more


def measure_moments(
    model: "nn.Module",
    batches: Iterable[Any],
    *,
    adapter: Adapter,
    out_side: bool = False,
    loss: "Loss | None" = None,
    source: Mapping[str, Any] | None = None,
) -> Moments:
    """What the inputs in ``batches`` excite in every module of an adapter.

    K = E[z zᵀ], z = A x, where x are the inputs of a module **in the adapted model**: the adapter is on, so what the
    deeper modules see is what they will see in use.

    Parameters
    ----------
    model : nn.Module
        A ``peft.PeftModel`` that carries the adapter, unmerged and switched on, which is run as it is; or its base, of
        transformers or plain torch, to which the adapter's own update is added by hooks. Put into evaluation mode, so
        without dropout, and back. Any float dtype, on any device.
    batches : iterable
        What the model is called with: mappings as keywords, tuples as arguments, anything else as the only argument.
        With an ``attention_mask`` (batch, length), positions of 0 count nowhere that inputs come as (batch, length, …)
        or as batch · length rows.
    adapter : Adapter
        Whose modules are measured.
    out_side : bool
        Also G = E[(Bᵀg)(Bᵀg)ᵀ], g the gradient of the loss at the module's output: a backward pass a batch.
    loss : callable, optional
        From what the model returned and the batch to the scalar to differentiate. By default ``.loss`` of what it
        returned. Let it be a sum over positions, so that batches of any size weigh alike.
    source : mapping, optional
        What the data is, kept with the result as it is; ``batches``, how many there were, is added.

    Returns
    -------
    Moments
        Modules that no input reached have count 0 and are named by its ``unreached``; those that cannot be measured
        (no pair, or no layer of their own: stacks of experts, fused attention, grouped convolutions) are in
        ``unmeasured``, with the reason, and are applied all the same.

    Raises
    ------
    MismatchError
        The adapter does not fit the model, or the PEFT model carries another one, or none.
    OptionError
        No batches; or a gradient is wanted and there is no loss.

    Notes
    -----
    z and ‖x‖² are computed in float32 and summed in float64. Costs the forward pass, r² numbers a module and nothing
    of the size of a weight.
    """
    sums, count = _Sums(out_side=out_side), 0
    with still(model, gradient=out_side), _watched(model, adapter, sums.watch) as hooked:
        for batch in batches:
            count += 1
            sums.mask = _mask(batch)
            _run(model, batch, gradient=out_side, loss=loss)
    if not count:
        raise OptionError("there are no batches to calibrate on", fix="give at least one input")
    return Moments(
        modules=sums.moments({name: adapter[name].rank for name in hooked}),
        fingerprint=fingerprint(adapter),
        unmeasured={name: _reason(module) for name, module in adapter.items() if name not in hooked},
        source={"batches": count, **(source or {})},
    )


@final
class _Sums:
    """Σ z zᵀ, Σ (Bᵀg)(Bᵀg)ᵀ, Σ ‖x‖² and how many z, for every hooked module, in float64."""

    def __init__(self, *, out_side: bool) -> None:
        self.out_side = out_side
        self.mask: Tensor | None = None  # of the positions of this batch that count
        self._in: dict[str, Tensor] = {}
        self._out: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def watch(self, name: str, factor_steps: Steps, x: "Tensor", z: "Tensor", output: "Tensor") -> "Tensor":
        """Add one call of a module, and listen for the gradient at its output."""
        rows, squares = self._rows(z.detach()), self._rows(factor_steps.squares(x.detach())[..., None])
        self._in[name] = self._in.get(name, 0) + rows.T @ rows
        self._squares[name] = self._squares.get(name, 0.0) + float(squares.sum())
        self._counts[name] += len(rows)
        if not self.out_side:
            return output
        leaf = not output.requires_grad
        output.requires_grad_().register_hook(partial(self._gradient, name, factor_steps))  # type: ignore[no-untyped-call]
        return output.clone() if leaf else output  # what comes next may write into it, and must not into a leaf

    def _gradient(self, name: str, factor_steps: Steps, g: "Tensor") -> None:
        rows = self._rows(factor_steps.back(g.detach()))
        self._out[name] = self._out.get(name, 0) + rows.T @ rows

    def _rows(self, z: "Tensor") -> "Tensor":
        """The z of positions that count, float64, shape (count, r)."""
        if z.device.type == "mps":  # which has no float64
            z = z.cpu()
        rows, mask = z.reshape(-1, z.shape[-1]), self.mask
        if mask is not None and (z.shape[:-1] == mask.shape or z.shape[:-1] == (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(z.device)]
        return rows.double()

    def moments(self, ranks: Mapping[str, int]) -> dict[str, Moment]:
        """The means, for modules of these ranks."""
        return {name: self._moment(name, rank) for name, rank in ranks.items()}

    def _moment(self, name: str, rank: int) -> Moment:
        count = self._counts[name]
        K, G = (
            sums[name].cpu().numpy() / count if count and name in sums else np.zeros((rank, rank))
            for sums in (self._in, self._out)
        )
        trace = self._squares[name] / count if count else 0.0
        return Moment(K, count, G if self.out_side else None, trace=trace)


def _mask(batch: Any) -> "Tensor | None":
    """Which positions of a batch count: None where it does not say."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return None if mask is None or mask.ndim != 2 else mask.bool()


def _run(model: "nn.Module", batch: Any, *, loss: "Loss | None", gradient: bool) -> None:
    """One forward pass, and one backward where a gradient is wanted."""
    output = call(model, batch)
    if not gradient:
        return
    value = loss(output, batch) if loss else getattr(output, "loss", None)
    if value is None:
        raise OptionError(
            "the model returned no loss, and the out side needs one", fix="put labels into the batches, or pass loss="
        )
    value.backward()


@contextmanager
def _watched(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """The model with the adapter on and its modules watched; the names of those that are."""
    if hasattr(model, "peft_config"):
        with _carried(model, adapter, watch) as hooked:
            yield hooked
        return
    attachment = Attachment(model, adapter)
    with attachment.on(watch):
        yield attachment.hooked


@contextmanager
def _carried(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """Watch the layers of a PEFT model, which has the adapter on already; the names of what is watched."""
    tree = Tree.of(model)
    weights = tree.weights(adapter).modules
    with ExitStack() as stack:
        hooked = []
        for name, module in adapter.items():
            key = weights[name].key
            layer = tree.layers[key.removesuffix(".weight")] if key.endswith(".weight") else None
            inner = getattr(layer, "base_layer", None)
            if layer is None or not isinstance(module, LowRank):
                continue
            with place(name):
                _check_carried(layer, module)
            factor_steps = steps(module, inner) if inner is not None else None
            if factor_steps is None:
                continue
            stack.callback(
                layer.register_forward_hook(partial(_seen, name, factor_steps, watch), with_kwargs=True).remove
            )
            hooked.append(name)
        yield tuple(hooked)


def _seen(
    name: str,
    factor_steps: Steps,
    watch: "Watch",
    layer: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Any,
) -> Any:
    del layer
    x = first_input(args, kwargs)
    return watch(name, factor_steps, x, factor_steps.inside(x), output)


def _check_carried(layer: Any, module: LowRank) -> None:
    """Refuse a PEFT layer that does not carry this pair, or does not use it."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        raise MismatchError("PEFT has this layer merged or switched off", fix="unmerge the model and enable adapters")
    A, B = module.A.astype(np.float64), module.scale * module.B.astype(np.float64)
    for name in getattr(layer, "active_adapters", ()):
        scale = getattr(layer, "scaling", {}).get(name, 1.0)
        if _near(_held(layer, "A", name), A) and _near(scale * _held(layer, "B", name), B):
            return
    raise MismatchError("the PEFT model does not carry this adapter", fix="load this adapter into it, and activate it")


def _held(layer: Any, side: str, name: str) -> Array:
    """The numbers of a factor as PEFT holds it, float64, one dimension; none where the layer has no such pair."""
    for factors in (getattr(layer, f"lora_{side}", {}), getattr(layer, f"lora_embedding_{side}", {})):
        if name in factors:
            own = getattr(factors[name], "weight", factors[name])
            return np.asarray(own.detach().double().cpu().numpy().reshape(-1))
    return np.empty(0)


def _near(stored: Array, expected: Array) -> bool:
    return stored.size == expected.size and bool(
        np.linalg.norm(stored - expected.ravel()) <= SAME * np.linalg.norm(expected)
    )


def _reason(module: Update) -> str:
    """Why a module could not be measured."""
    if not isinstance(module, LowRank):
        return f"a {module.form.name} has no A"
    return "its weight is that of no linear, embedding or ungrouped convolution that is called"
