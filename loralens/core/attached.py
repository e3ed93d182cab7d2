"""Attachment: an adapter at work in a torch model that is its base, and gone again afterwards.

Where the adapted weight belongs to a layer (linear, convolution, embedding), a hook adds scale·B·A·x to the layer's
output: the weight stays as it is and nothing is rounded to its dtype but the sum. Elsewhere (stacks of experts, fused
attention, LyCORIS products) the weight itself is changed while the adapter is on, and put back, the same bits, after.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, final

from loralens.core.adapter import Adapter, Extra
from loralens.core.carried import ADDED
from loralens.core.layers import Steps, compute_dtype, steps, tensor
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.weights import Weight, Weights, weights_of
from loralens.errors import place

if TYPE_CHECKING:
    from torch import Tensor, nn

    Watch = Callable[[str, Steps, Tensor, Tensor, Tensor], Tensor]

PEFT_PREFIX = "base_model.model."
BENDING = ("magnitude", "norms")  # extras that make a module DoRA, one number an output
REPLACED = ("saved", "embedding", "bias")  # extras that take the place of a parameter of the model


@final
@dataclass(frozen=True, slots=True)
class Tree:
    """Layers and parameters of a model by their names in the base model, wrappers of PEFT looked through.

    Attributes
    ----------
    layers : mapping of str to nn.Module
        What is called with the input x: PEFT's wrapper where there is one.
    parameters : mapping of str to tuple of nn.Module and str
        The layer that holds each parameter, and its name there.
    """

    layers: "Mapping[str, nn.Module]"
    parameters: "Mapping[str, tuple[nn.Module, str]]"

    @classmethod
    def of(cls, model: "nn.Module") -> "Tree":
        """The tree of a torch model."""
        outer: dict[str, nn.Module] = {}
        inner: dict[str, nn.Module] = {}
        for path, layer in model.named_modules(remove_duplicate=False):
            parts = path.removeprefix(PEFT_PREFIX).split(".")
            name = ".".join(part for part in parts if part != "base_layer")
            outer.setdefault(name, layer)
            inner[name] = layer
        parameters = {
            f"{name}.{own}" if name else own: (layer, own)
            for name, layer in inner.items()
            for own, _ in layer.named_parameters(recurse=False)
        }
        return cls(outer, parameters)

    def parameter(self, key: str) -> "nn.Parameter":
        """The parameter of that name."""
        layer, own = self.parameters[key]
        parameter: nn.Parameter = getattr(layer, own)
        return parameter

    def weights(self, adapter: Adapter) -> Weights:
        """Which parameter each module adapts, by shapes alone.

        Raises
        ------
        MismatchError
            A module has no weight in the model, or one of another shape.
        """
        stored = {key: _shape_of(self.parameter(key)) for key in self.parameters}
        conv1d = any(type(layer).__name__ == "Conv1D" for layer in self.layers.values())
        return weights_of(adapter.modules, stored, conv1d=conv1d)


def _shape_of(parameter: "nn.Parameter") -> LazyArray:
    """A parameter's shape, in the form that matching takes; its numbers stay with torch."""

    def unread() -> NoReturn:
        raise AssertionError("matching reads shapes only")

    return LazyArray(unread, shape=tuple(parameter.shape), dtype="float32")


@final
class Attachment:
    """An adapter made ready for one model; ``with attachment.on():`` puts it to work.

    Attributes
    ----------
    hooked : tuple of str
        Modules whose update a hook adds.
    changed : tuple of str
        Modules whose weight is changed in place, rounded to its dtype.
    left_out : mapping of str to str
        Key of every stored tensor that is not applied → why.
    ran : set of str
        Hooked modules that were called since; one that never was did nothing.

    Raises
    ------
    MismatchError
        The adapter does not fit the model.
    """

    def __init__(self, model: "nn.Module", adapter: Adapter) -> None:
        self.tree = Tree.of(model)
        weights = self.tree.weights(adapter)
        self.ran: set[str] = set()
        self.left_out: dict[str, str] = {}
        self._steps: dict[str, tuple[nn.Module, Steps]] = {}
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}  # DoRA: the layer's bias and m / ‖W + ΔW‖, per output
        self._biases: dict[str, Tensor] = {}  # of B
        self._new: dict[str, Tensor] = {}  # whole parameters, by key
        self.changed: tuple[str, ...] = ()
        for name, module in adapter.items():
            weight = weights.modules[name]
            hooked = weight.key.endswith(".weight") and not weight.scattered
            layer = self.tree.parameters[weight.key][0] if hooked else None
            with place(name):
                found = steps(module, layer) if isinstance(module, LowRank) and layer is not None else None
            if found is None or layer is None:
                self._change(name, module, weight)
            else:
                self._steps[name] = (layer, found)
        for key, extra in sorted(adapter.extra.items(), key=lambda item: item[1].role in BENDING):  # biases first
            self._take(key, extra, adapter, weights)

    @property
    def hooked(self) -> tuple[str, ...]:
        """Modules whose update a hook adds."""
        return tuple(self._steps)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Parameters of the model that are others while the adapter is on, by their keys."""
        return tuple(self._new)

    @contextmanager
    def on(self, watch: "Watch | None" = None) -> Iterator[None]:
        """The model with the adapter, inside the block.

        ``watch``, where one is given, gets the name, the steps, x, z and the adapted output of every hooked module
        that is called, and returns the output to go on with.
        """
        with ExitStack() as stack:
            for key, new in self._new.items():
                parameter = self.tree.parameter(key)
                stack.callback(partial(setattr, parameter, "data", parameter.data))
                parameter.data = new
            for name, (layer, found) in self._steps.items():
                hook = partial(self._hook, name, found, watch)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(
        self,
        name: str,
        found: Steps,
        watch: "Watch | None",
        layer: "nn.Module",
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: "Tensor",
    ) -> "Tensor":
        del layer
        self.ran.add(name)
        x = first_input(args, kwargs)
        z = found.inside(x)
        adapted = output + found.outside(z)  # float32 beside a 16-bit output: rounded once, below
        if name in self._biases:
            adapted = adapted + self._biases[name]
        if name in self._norms:
            bias, factor = self._norms[name]
            adapted = (adapted - bias) * factor + bias
        adapted = adapted.to(output.dtype)
        return adapted if watch is None else watch(name, found, x, z, adapted)

    def _change(self, name: str, module: Update, weight: Weight) -> None:
        """Make the weights that a module of no hookable layer changes: themselves + ΔW, rounded once."""
        from torch import contiguous_format  # of which a reshape is a view

        for piece in weight.pieces:
            whole = self._new.get(piece.key)
            if whole is None:
                own = self.tree.parameter(piece.key).detach()
                whole = self._new[piece.key] = own.clone(memory_format=contiguous_format)
            matrix = whole.reshape(-1, piece.width)[piece.start : piece.start + piece.rows]
            part = matrix if piece.columns is None else matrix[:, piece.columns]
            dtype = compute_dtype(whole)
            update = tensor(module.dense(), whole, dtype)
            update = (update.T if weight.transposed else update)[piece.at : piece.at + piece.rows]
            part.copy_(part.to(dtype) + update)
        self.changed = (*self.changed, name)

    def _take(self, key: str, extra: Extra, adapter: Adapter, weights: Weights) -> None:
        """Find a place for a tensor that is half of no pair, or say why there is none."""
        if extra.role == "copy":
            return
        if extra.role in REPLACED + ADDED:
            self._replace(key, extra, weights)
        elif extra.module not in self._steps:
            self.left_out[key] = f"{extra.role}: {extra.module} is no layer here that a hook can adapt"
        elif extra.role in BENDING:
            self._renormalise(key, extra, adapter, weights)
        elif extra.role == "lora_bias":
            update = adapter[extra.module].scale * extra.tensor.read().astype("float64").reshape(-1)
            self._biases[extra.module] = self._beside(extra.module, update)
        else:
            self.left_out[key] = f"{extra.role}: has no equivalent here"

    def _replace(self, key: str, extra: Extra, weights: Weights) -> None:
        """Let a parameter that was trained in full take the place of the model's own; add a difference to it."""
        name = f"{weights.match.rename(extra.module)}.{extra.parameter}"
        if extra.module in weights.modules:
            name = f"{weights.modules[extra.module].key.removesuffix('.weight')}.{extra.parameter}"
        if name not in self.tree.parameters or self.tree.parameter(name).numel() != extra.tensor.size:
            self.left_out[key] = f"{extra.role}: the model has no parameter of this name and size"
            return
        own = self.tree.parameter(name).detach()
        new = tensor(extra.tensor.read(), own, compute_dtype(own)).reshape(own.shape)
        self._new[name] = (self._new.get(name, own) + new if extra.role in ADDED else new).to(own.dtype)

    def _renormalise(self, key: str, extra: Extra, adapter: Adapter, weights: Weights) -> None:
        """DoRA: y becomes (W + ΔW) x · m / ‖W + ΔW‖, the norm per output."""
        name, (layer, _) = extra.module, self._steps[extra.module]
        module, weight = adapter[name], weights.modules[name]
        own = self.tree.parameter(weight.key).detach()
        if extra.role == "magnitude" and extra.tensor.size != module.shape[0]:
            self.left_out[key] = f"{extra.role}: {extra.tensor.size} numbers, not one for each of its outputs"
            return
        dtype = compute_dtype(own)
        W = (own.T if weight.transposed else own).reshape(module.shape).to(dtype)
        norm = (W + tensor(module.dense(), own, dtype)).norm(dim=1)
        bias = self._new.get(f"{weight.key.removesuffix('.weight')}.bias", getattr(layer, "bias", None))
        if extra.role == "norms":  # the file has none: PEFT takes the lengths of W, in the dtype of W
            m = self._laid(name, W.norm(dim=1).to(own.dtype).to(dtype))
        else:
            m = self._beside(name, extra.tensor.read().reshape(-1))
        factor = m / self._laid(name, norm)
        self._norms[name] = (self._laid(name, norm * 0 if bias is None else bias.detach().to(dtype)), factor)

    def _beside(self, name: str, array: Any) -> "Tensor":
        """One number for each output, as a tensor that broadcasts against the output of the layer."""
        weight: Any = self._steps[name][0].weight
        return self._laid(name, tensor(array, weight, compute_dtype(weight)))

    def _laid(self, name: str, numbers: "Tensor") -> "Tensor":
        """(out,) along the channels of a convolution's output, along the last axis of any other."""
        return numbers.reshape(-1, *(1,) * (-1 - self._steps[name][1].axis))


@contextmanager
def modes_kept(model: "nn.Module") -> Iterator[None]:
    """A block after which every module is in training or evaluation mode as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def still(model: "nn.Module", *, gradient: bool) -> Iterator[None]:
    """A block in which the model is in evaluation mode and no parameter asks for a gradient; both are put back after.

    ``gradient``: whether torch tracks gradients there, as of inputs.
    """
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with modes_kept(model), torch.set_grad_enabled(gradient):
            model.eval()
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def call(model: "nn.Module", batch: Any) -> Any:
    """What the model returns for a batch: a mapping is its keywords, a tuple its arguments, anything else its only one.

    Tensors go to the device of the model first.
    """
    device = next(model.parameters()).device

    def moved(value: Any) -> Any:
        return value.to(device) if hasattr(value, "to") else value

    if isinstance(batch, Mapping):
        return model(**{key: moved(value) for key, value in batch.items()})
    return model(*map(moved, batch)) if isinstance(batch, tuple) else model(moved(batch))


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Tensor":
    """The input x of a layer, however its caller passed it."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
