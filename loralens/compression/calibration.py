"""Calibration: the moments of an adapter's bottlenecks z = A x, measured by running a model on real inputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, Tree, call, first_input, frozen_evaluation
from loralens.core.fingerprint import fingerprint
from loralens.core.layers import Steps, steps
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.moments import Moment, Moments
from loralens.core.structured import Update
from loralens.errors import MismatchError, OptionError, place

if TYPE_CHECKING:  # importing torch takes 1.4 s, and whoever passes a model has imported it
    from torch import Tensor, nn

    from loralens.core.attached import Watch

    Loss = Callable[[Any, Any], Tensor]

SAME = 1e-2  # relative distance of PEFT's factor from ours: bfloat16 rounding stays below it, another adapter does not


def measure_moments(
    model: "nn.Module",
    batches: Iterable[Any],
    *,
    adapter: Adapter,
    out_side: bool = False,
    loss: "Loss | None" = None,
    source: Mapping[str, Any] | None = None,
) -> Moments:
    """Measure what the inputs in ``batches`` excite in every module of an adapter.

    K = E[z zᵀ], z = A x, where x are the inputs of a module **in the adapted model**: the adapter is on, so what the
    deeper modules see is what they will see in use.

    Parameters
    ----------
    model : nn.Module
        Either a ``peft.PeftModel`` that carries the adapter, unmerged and active, which is run as it is; or the base
        model, of transformers or plain torch, to which hooks add the update of the adapter. The model is run in
        evaluation mode, so without dropout, and is set back afterwards. Any float dtype, on any device.
    batches : iterable
        The model's inputs: mappings are passed as keyword arguments, tuples as positional arguments, and anything else
        as the only argument. With an ``attention_mask`` (batch, length), positions of 0 are not counted in modules
        whose inputs come as (batch, length, …) or as batch · length rows.
    adapter : Adapter
        The adapter whose modules are measured.
    out_side : bool
        Also measure G = E[(Bᵀg)(Bᵀg)ᵀ], where g is the gradient of the loss at the output of the module. This takes a
        backward pass for every batch.
    loss : callable, optional
        (output of the model, batch) → the scalar to differentiate; by default the ``.loss`` of the output. It should be
        a sum over positions, so that every position has the same weight in batches of any size.
    source : mapping, optional
        A description of the data, which is stored in the result with the number of ``batches``.

    Returns
    -------
    Moments
        Modules that no input reached have the count 0 and are listed in ``unreached``. Modules that cannot be measured
        are in ``unmeasured`` with the reason: they are not pairs, or have no layer of their own (expert stacks, fused
        attention, grouped convolutions). Their updates are applied nevertheless.

    Raises
    ------
    MismatchError
        The adapter does not fit the model, or the PEFT model does not contain this adapter.
    OptionError
        There are no batches, or ``out_side`` is set and there is no loss.

    Notes
    -----
    z and ‖x‖² are computed in float32 and summed in float64. Besides the forward pass this takes r² numbers a module,
    and nothing of the size of a weight.
    """
    sums, count = _Sums(out_side=out_side), 0
    # Without dropout, because the moments are those of the model in use.
    with frozen_evaluation(model, gradient=out_side), _watch_modules(model, adapter, sums.watch) as hooked:
        for batch in batches:
            count += 1
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            sums.mask = None if mask is None or mask.ndim != 2 else mask.bool()  # a 4-D mask does not list positions
            output = call(model, batch)
            if not out_side:
                continue
            value = loss(output, batch) if loss else getattr(output, "loss", None)
            if value is None:
                what = "the model returned no loss, and the out side needs one"
                raise OptionError(what, fix="put labels into the batches, or pass loss=")
            value.backward()
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
        self.mask: Tensor | None = None  # True at the positions of this batch that count
        self._in: dict[str, Tensor] = {}
        self._out: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def watch(self, name: str, factor_steps: Steps, x: "Tensor", z: "Tensor", output: "Tensor") -> "Tensor":
        """Add one call of a module, and register a hook for the gradient at its output."""
        # The trace of E[x xᵀ] needs one number for each position, and no matrix of the size of a weight.
        rows, squares = self._rows(z.detach()), self._rows(factor_steps.squares(x.detach())[..., None])
        self._in[name] = self._in.get(name, 0) + rows.T @ rows
        self._squares[name] = self._squares.get(name, 0.0) + float(squares.sum())
        self._counts[name] += len(rows)
        if not self.out_side:
            return output

        def add_gradient(g: "Tensor") -> None:
            rows = self._rows(factor_steps.back(g.detach()))
            self._out[name] = self._out.get(name, 0) + rows.T @ rows

        leaf = not output.requires_grad
        output.requires_grad_().register_hook(add_gradient)  # type: ignore[no-untyped-call]
        # Later layers may write into the output in place, which torch forbids for a leaf.
        return output.clone() if leaf else output

    def _rows(self, z: "Tensor") -> "Tensor":
        """The rows of z at the positions that count, float64, shape (count, r)."""
        if z.device.type == "mps":  # Apple's backend has no float64
            z = z.cpu()
        # Some models flatten (batch, length) before a module; a module that sees other positions is counted whole.
        rows, mask = z.reshape(-1, z.shape[-1]), self.mask
        if mask is not None and (z.shape[:-1] == mask.shape or z.shape[:-1] == (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(z.device)]
        return rows.double()

    def moments(self, ranks: Mapping[str, int]) -> dict[str, Moment]:
        """The means, for modules of these ranks."""
        moments = {}
        for name, rank in ranks.items():
            count = self._counts[name]
            # A module that no input reached has moments of 0, and one whose output has no effect on the loss a G of 0.
            K, G = (
                sums[name].cpu().numpy() / count if count and name in sums else np.zeros((rank, rank))
                for sums in (self._in, self._out)
            )
            trace = self._squares[name] / count if count else 0.0
            moments[name] = Moment(K, count, G if self.out_side else None, trace=trace)
        return moments


@contextmanager
def _watch_modules(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """Run the block with the adapter applied and its modules watched; yields the names of the watched modules."""
    if hasattr(model, "peft_config"):
        with _watch_peft(model, adapter, watch) as hooked:
            yield hooked
        return
    attachment = Attachment(model, adapter)
    with attachment.on(watch):
        yield attachment.hooked


@contextmanager
def _watch_peft(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """Watch the layers of a PEFT model, which applies the adapter itself; yields the names of the watched modules."""
    tree = Tree.of(model)
    weights = tree.weights(adapter).modules
    with ExitStack() as stack:
        hooked = []
        for name, module in adapter.items():
            key = weights[name].key
            # PEFT's layers wrap the layer that they adapt; what it applies elsewhere, such as to parameters, has none.
            layer = tree.layers[key.removesuffix(".weight")] if key.endswith(".weight") else None
            inner = getattr(layer, "base_layer", None)
            if layer is None or not isinstance(module, LowRank):
                continue
            with place(name):
                _check_carried(layer, module)
            factor_steps = steps(module, inner) if inner is not None else None
            if factor_steps is None:
                continue
            stack.callback(layer.register_forward_hook(_hook(name, factor_steps, watch), with_kwargs=True).remove)
            hooked.append(name)
        yield tuple(hooked)


def _hook(name: str, factor_steps: Steps, watch: "Watch") -> Callable[..., Any]:
    """A forward hook that shows the input, z and the output of a layer to ``watch``."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        x = first_input(args, kwargs)
        return watch(name, factor_steps, x, factor_steps.inside(x), output)

    return hook


def _check_carried(layer: Any, module: LowRank) -> None:
    """Raise a MismatchError if a PEFT layer does not carry this pair, or does not use it."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        raise MismatchError("PEFT has this layer merged or switched off", fix="unmerge the model and enable adapters")
    # B is compared with its scale: the same factors under another α are another adapter.
    A, B = module.A.astype(np.float64), module.scale * module.B.astype(np.float64)
    # PEFT adds up all active adapters; this one has to be among them, under whatever name it was loaded.
    for name in getattr(layer, "active_adapters", ()):
        scale = getattr(layer, "scaling", {}).get(name, 1.0)
        if _near(_peft_factor(layer, "A", name), A) and _near(scale * _peft_factor(layer, "B", name), B):
            return
    raise MismatchError(
        "the PEFT model does not contain this adapter", fix="load this adapter into it, and activate it"
    )


def _peft_factor(layer: Any, side: str, name: str) -> Array:
    """The entries of PEFT's factor, float64, flat; empty if the layer has no such pair."""
    # PEFT keeps the factors of embeddings apart, as bare parameters without a layer around them.
    for factors in (getattr(layer, f"lora_{side}", {}), getattr(layer, f"lora_embedding_{side}", {})):
        if name in factors:
            own = getattr(factors[name], "weight", factors[name])
            return np.asarray(own.detach().double().cpu().numpy().reshape(-1))
    return np.empty(0)


def _near(stored: Array, expected: Array) -> bool:
    if stored.size != expected.size:
        return False
    return bool(np.linalg.norm(stored - expected.ravel()) <= SAME * np.linalg.norm(expected))


def _reason(module: Update) -> str:
    """The reason why a module could not be measured, for the user."""
    if not isinstance(module, LowRank):
        return f"a {module.form.name} has no A"
    return "its weight does not belong to a linear layer, an embedding or an ungrouped convolution that is called"


# Both losses are sums over positions, so that all positions weigh the same in batches of any size.
def next_token_loss(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(next token) of a causal language model, over neighbours that are both in the attention mask."""
    from torch.nn.functional import cross_entropy

    logits, ids, mask = output.logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"].bool()
    # A token after padding has nothing to be predicted from.
    both = (mask[:, 1:] & mask[:, :-1]).to(logits.device)
    return cross_entropy(logits[both].float(), ids.to(logits.device)[both], reduction="sum")


def label_loss(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(label) of a classifier; the batch has ``labels``."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits.float(), batch["labels"].to(output.logits.device), reduction="sum")
