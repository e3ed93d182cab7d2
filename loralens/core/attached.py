"""`Attachment`: applies an adapter to its base, a torch model, for the duration of a block.

If the adapted weight belongs to a layer (linear, convolution, embedding), a hook adds scale·B·A·x to the output of the
layer. The weight does not change, and only the sum is rounded to its dtype. Otherwise (stacks of experts, fused
attention, LyCORIS products) the weight itself is changed within the block, and restored bit for bit after it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, final

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import without_numbers
from loralens.core.lowrank import LowRank
from loralens.core.names import without_wrappers
from loralens.core.structured import Update
from loralens.core.together import ADDED
from loralens.core.weights import Weight, Weights, weights_of
from loralens.errors import MismatchError, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Watch = Callable[[str, "Steps", Tensor, Tensor, Tensor], Tensor]


@final
@dataclass(frozen=True, slots=True)
class Steps:
    """The two steps of a pair in one layer: z = A x, and the update B z.

    Linear layers are ``nn.Linear`` and GPT-2's Conv1D, with its weight stored as (in, out). In a convolution A is a
    kernel of the same size with r outputs, and B a 1 × 1 kernel. In an embedding x is one-hot, so A x is a column of A.
    """

    A: "Tensor"  # of an embedding its transpose, so that a lookup reads the r numbers of a token in one place
    B: "Tensor"
    scale: float
    kind: Literal["linear", "convolution", "embedding"] = "linear"
    layer: Any = None
    axis: int = -1  # of the channels of the output, from the end, because the batch axis may be missing

    def inside(self, x: "Tensor") -> "Tensor":
        """A x: (…, in) → (…, r), with whole numbers (…) for an embedding, and (…, in, size…) for a convolution."""
        if self.kind == "embedding":
            return self.A[x]
        if self.kind == "linear":
            return x.to(self.A.dtype) @ self.A.T
        # The layer's own method applies its stride, dilation and padding mode.
        z: Tensor = self.layer._conv_forward(x.to(self.A.dtype), self.A, None)
        return z.movedim(self.axis, -1)

    def squares(self, x: "Tensor") -> "Tensor":
        """‖x‖² of every input, shape (…); in a convolution of the patch under the kernel, with the layer's padding."""
        if self.kind == "embedding":  # one-hot vectors have length 1
            return self.A.new_ones(x.shape)
        squares = x.to(self.A.dtype).square()
        if self.kind == "linear":
            return squares.sum(-1)
        # A kernel of ones sums the squares under it.
        sums: Tensor = self.layer._conv_forward(squares, self.A.new_ones((1, *self.A.shape[1:])), None)
        return sums.squeeze(self.axis)

    def outside(self, z: "Tensor") -> "Tensor":
        """Scale · B z: (…, r) → the shape of the output."""
        # The scale is applied to z, which has fewer numbers than the output.
        return ((self.scale * z) @ self.B.T).movedim(-1, self.axis)

    def back(self, g: "Tensor") -> "Tensor":
        """Bᵀ g of gradients of the output: → (…, r)."""
        return g.to(self.B.dtype).movedim(self.axis, -1) @ self.B


def steps(module: LowRank, layer: "nn.Module") -> Steps | None:
    """The steps of a pair for its layer; None if a hook on the layer cannot apply the pair.

    This is the case for parameters that are not the weight of a layer, for unknown types of layers, for grouped
    convolutions (every group has its own A x), and for the ``out_proj`` of ``nn.MultiheadAttention``, which is never
    called.
    """
    from torch import nn

    # Types are compared by the names of all base classes: transformers' Conv1D may be subclassed, and importing it only
    # for this comparison would be slow.
    names = {base.__name__ for base in type(layer).__mro__}
    weight: Any = getattr(layer, "weight", None)
    # torch's fast path of attention uses the weight of out_proj without calling the layer.
    if weight is None or "NonDynamicallyQuantizableLinear" in names:
        return None
    A, B, scale = tensor(module.A, weight), tensor(module.B, weight), module.scale
    if isinstance(layer, nn.Embedding):
        _check(module, tuple(weight.shape[::-1]))
        # Gemma multiplies the embedding by √hidden in the layer itself.
        return Steps(A.T.contiguous(), B * getattr(layer, "embed_scale", 1.0), scale, "embedding")
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        # In a grouped convolution every group reads other channels.
        if layer.groups > 1:
            return None
        # The weight has as many axes as a batch of outputs, and in both the channels are on axis 1.
        kernel = A.reshape(len(A), *weight.shape[1:])
        return Steps(kernel, B, scale, "convolution", layer, axis=1 - weight.ndim)
    if not (isinstance(layer, nn.Linear) or "Conv1D" in names):
        return None
    _check(module, tuple(weight.shape[::-1] if "Conv1D" in names else weight.shape))
    return Steps(A, B, scale)


def _check(module: LowRank, shape: tuple[int, ...]) -> None:
    """Check that the update has the orientation of the layer; matching by shapes accepts both orientations."""
    if module.shape != shape:
        raise MismatchError(
            f"its update has the shape {module.shape}, and the layer has {shape}",
            fix="give the model that it was trained for",
        )


def compute_dtype(like: "Tensor") -> "torch.dtype":
    """float64 for float64 weights, float32 for all others."""
    import torch

    return torch.float64 if like.dtype == torch.float64 else torch.float32


def tensor(array: Any, like: "Tensor") -> "Tensor":
    """A torch copy of a NumPy array of any float dtype, on the device of ``like`` in its `compute_dtype`."""
    import torch

    dtype = compute_dtype(like)
    # torch does not know the types of ml_dtypes, so narrower floats are converted to float32, which holds all of their
    # values.
    wide = np.float64 if dtype == torch.float64 or array.dtype == np.float64 else np.float32
    return torch.from_numpy(np.array(array, wide)).to(like.device, dtype)


def unwrap(model: "nn.Module") -> "nn.Module":
    """The model inside of DDP, which is recognised by its class: layers of a model may be called ``module`` too."""
    while type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        model = model.module  # type: ignore[assignment]
    return model


def plain_path(path: str) -> str:
    """The name of a module or parameter in the base model, without the parts that wrappers insert."""
    return ".".join(part for part in without_wrappers(path).split(".") if part != "base_layer")


PEFT_PREFIX = "base_model.model."  # what all names in a model that PEFT wraps begin with
# `magnitude_in` is not among them: factors for the inputs would have to scale x, and a hook sees the output alone.
BENDING = ("magnitude", "norms")  # roles of extras that make a module DoRA with one number for each output
REPLACED = ("saved", "embedding", "bias")  # roles of extras that replace a parameter of the model


@final
@dataclass(frozen=True, slots=True)
class Tree:
    """Layers and parameters of a model by their names in the base model, without the wrappers of PEFT.

    Attributes
    ----------
    layers : mapping of str to nn.Module
        The layer that is called with the input x, which is PEFT's wrapper if there is one.
    parameters : mapping of str to tuple of nn.Module and str
        The layer that has each parameter, and its name in the layer.
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
            # PEFT's wrapper comes first and is what the model calls; the base layer below it has the same name.
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
        """The parameter that each module adapts, found by names and shapes.

        Raises
        ------
        MismatchError
            A module has no weight in the model, or a weight of another shape.
        """
        # Matching reads shapes and no numbers, so no parameter is converted to NumPy for it.
        stored = {key: without_numbers(tuple(self.parameter(key).shape), "float32") for key in self.parameters}
        conv1d = any(type(layer).__name__ == "Conv1D" for layer in self.layers.values())
        return weights_of(adapter.modules, stored, conv1d=conv1d)


@final
class Attachment:
    """An adapter that is prepared for one model; ``with attachment.on():`` applies it.

    Attributes
    ----------
    changed : tuple of str
        Modules whose weight is changed in place and rounded to its dtype.
    left_out : mapping of str to str
        Key of every stored tensor that is not applied → the reason.
    ran : set of str
        Hooked modules that have been called. The update of any other hooked module had no effect.

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
        # DoRA: the bias of the layer, and m / ‖W + ΔW‖ for each output.
        self._norms: dict[str, tuple[Tensor, Tensor]] = {}
        self._biases: dict[str, Tensor] = {}  # biases on B
        self._new: dict[str, Tensor] = {}  # new values of whole parameters, by key
        self.changed: tuple[str, ...] = ()
        for name, module in adapter.items():
            weight = weights.modules[name]
            # A hook sees the whole output of a layer, so its weight must be exactly the weight of one layer.
            hooked = weight.key.endswith(".weight") and not weight.scattered
            layer = self.tree.parameters[weight.key][0] if hooked else None
            with place(name):
                steps_of_pair = steps(module, layer) if isinstance(module, LowRank) and layer is not None else None
            if steps_of_pair is None or layer is None:
                self._change_weight(name, module, weight)
            else:
                self._steps[name] = (layer, steps_of_pair)
        # DoRA needs the bias that is in use, so trained biases are placed first.
        for key, extra in sorted(adapter.extra.items(), key=lambda item: item[1].role in BENDING):
            self._place_extra(key, extra, adapter, weights)

    @property
    def hooked(self) -> tuple[str, ...]:
        """Modules whose update a hook adds."""
        return tuple(self._steps)

    @property
    def replaced(self) -> tuple[str, ...]:
        """Keys of the parameters of the model that have other values while the adapter is applied."""
        return tuple(self._new)

    @contextmanager
    def on(self, watch: "Watch | None" = None) -> Iterator[None]:
        """Apply the adapter within the block.

        ``watch`` is called with the name, the steps, x, z and the adapted output of every hooked module, and returns
        the output that the model uses.
        """
        with ExitStack() as stack:
            for key, new in self._new.items():
                parameter = self.tree.parameter(key)
                # Registered before the change, so that the parameter is also restored if an error occurs in between.
                stack.callback(partial(setattr, parameter, "data", parameter.data))
                parameter.data = new
            for name, (layer, steps_of_pair) in self._steps.items():
                hook = partial(self._hook, name, steps_of_pair, watch)
                stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _hook(
        self,
        name: str,
        steps_of_pair: Steps,
        watch: "Watch | None",
        _layer: "nn.Module",
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: "Tensor",
    ) -> "Tensor":
        self.ran.add(name)
        x = first_input(args, kwargs)
        z = steps_of_pair.inside(x)
        adapted = output + steps_of_pair.outside(z)  # the sum of a float32 and a 16-bit tensor is float32
        if name in self._biases:
            adapted = adapted + self._biases[name]
        if name in self._norms:
            bias, factor = self._norms[name]
            # The norm belongs to W + ΔW alone, so the bias is taken out of the output and added again.
            adapted = (adapted - bias) * factor + bias
        # The only rounding to the dtype of the model.
        adapted = adapted.to(output.dtype)
        return adapted if watch is None else watch(name, steps_of_pair, x, z, adapted)

    def _change_weight(self, name: str, module: Update, weight: Weight) -> None:
        """Compute the new weights W + ΔW, rounded once, for a module whose layer cannot have a hook."""
        from torch import contiguous_format  # a reshape of a contiguous tensor is a view

        for piece in weight.pieces:
            changed_weight = self._new.get(piece.key)
            if changed_weight is None:
                own = self.tree.parameter(piece.key).detach()
                # Several modules may change the same tensor (the experts of a stack), so the copy is shared.
                changed_weight = self._new[piece.key] = own.clone(memory_format=contiguous_format)
            matrix = changed_weight.reshape(-1, piece.width)[piece.start : piece.start + piece.rows]
            part = matrix if piece.columns is None else matrix[:, piece.columns]
            update = tensor(module.dense(), changed_weight)
            update = (update.T if weight.transposed else update)[piece.at : piece.at + piece.rows]
            # Added in float32 and rounded once, as merging does.
            part.copy_(part.to(update.dtype) + update)
        self.changed = (*self.changed, name)

    def _place_extra(self, key: str, extra: Extra, adapter: Adapter, weights: Weights) -> None:
        """Prepare the effect of a tensor that does not belong to a pair, or note why it has none."""
        # PEFT stores some tensors twice. The original of the copy is applied.
        if extra.role == "copy":
            return
        if extra.role in REPLACED + ADDED:
            self._replace(key, extra, weights)
        elif extra.module not in self._steps:
            self.left_out[key] = f"{extra.role}: {extra.module} is not a layer that a hook can adapt here"
        elif extra.role in BENDING:
            self._renormalise(key, extra, adapter, weights)
        elif extra.role == "lora_bias":
            # Computed in float64, and rounded to the dtype of the computation once.
            update = adapter[extra.module].scale * extra.tensor.read().astype("float64").reshape(-1)
            self._biases[extra.module] = self._per_output(extra.module, update)
        else:
            self.left_out[key] = f"{extra.role}: has no equivalent here"

    def _replace(self, key: str, extra: Extra, weights: Weights) -> None:
        """Replace a parameter of the model by one that was trained in full, or add a full difference to it."""
        name = f"{weights.match.rename(extra.module)}.{extra.parameter}"
        if extra.module in weights.modules:
            name = f"{weights.modules[extra.module].key.removesuffix('.weight')}.{extra.parameter}"
        if name not in self.tree.parameters or self.tree.parameter(name).numel() != extra.tensor.size:
            self.left_out[key] = f"{extra.role}: the model has no parameter of this name and size"
            return
        own = self.tree.parameter(name).detach()
        # A second change of the same parameter is added to the first, so `_new` is read before the model is.
        new = tensor(extra.tensor.read(), own).reshape(own.shape)
        self._new[name] = (self._new.get(name, own) + new if extra.role in ADDED else new).to(own.dtype)

    def _renormalise(self, key: str, extra: Extra, adapter: Adapter, weights: Weights) -> None:
        """Prepare DoRA: y becomes (W + ΔW) x · m / ‖W + ΔW‖, with a norm for each output."""
        name, (layer, _) = extra.module, self._steps[extra.module]
        module, weight = adapter[name], weights.modules[name]
        own = self.tree.parameter(weight.key).detach()
        if extra.role == "magnitude" and extra.tensor.size != module.shape[0]:
            self.left_out[key] = f"{extra.role}: {extra.tensor.size} numbers, not one for each of its outputs"
            return
        dtype = compute_dtype(own)
        # The stored orientation may be (in, out), as in GPT-2; the norms are those of the outputs.
        W = (own.T if weight.transposed else own).reshape(module.shape).to(dtype)
        norm = (W + tensor(module.dense(), own)).norm(dim=1)
        # The bias in use, which may be a trained one.
        bias = self._new.get(f"{weight.key.removesuffix('.weight')}.bias", getattr(layer, "bias", None))
        if extra.role == "norms":  # no magnitude in the file: PEFT uses the lengths of W, in the dtype of W
            m = self._along_channels(name, W.norm(dim=1).to(own.dtype).to(dtype))
        else:
            m = self._per_output(name, extra.tensor.read().reshape(-1))
        factor = m / self._along_channels(name, norm)
        self._norms[name] = (self._along_channels(name, norm * 0 if bias is None else bias.detach().to(dtype)), factor)

    def _per_output(self, name: str, array: Any) -> "Tensor":
        """One number for each output, as a tensor that broadcasts against the output of the layer."""
        weight: Any = self._steps[name][0].weight
        return self._along_channels(name, tensor(array, weight))

    def _along_channels(self, name: str, numbers: "Tensor") -> "Tensor":
        """Reshape (out,) so that it lies along the axis of the channels in the output of the layer."""
        # `axis` is negative. One axis of length 1 is appended for each axis that comes after the axis of the channels.
        return numbers.reshape(-1, *(1,) * (-1 - self._steps[name][1].axis))


@contextmanager
def keep_modes(model: "nn.Module") -> Iterator[None]:
    """Restore the training or evaluation mode of every module after the block."""
    # Each module is restored on its own, because `train` and `eval` of a module also set all modules inside it.
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen_evaluation(model: "nn.Module", *, gradient: bool) -> Iterator[None]:
    """Put the model in evaluation mode without gradients of parameters within the block, and restore both after it.

    ``gradient`` says whether torch tracks gradients of other tensors, such as inputs.
    """
    import torch

    # Only these get their gradient back; parameters that were frozen before stay frozen.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with keep_modes(model), torch.set_grad_enabled(gradient):
            model.eval()
            for parameter in trained:
                # Without this, torch would keep activations for gradients of the weights.
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def call(model: "nn.Module", batch: Any) -> Any:
    """Call the model with a batch.

    A mapping is passed as keyword arguments, a tuple as positional arguments, and anything else as the only argument.
    Tensors are moved to the device of the model first.
    """
    # A model spread over several devices takes its input on the first.
    device = next(model.parameters()).device

    def to_device(value: Any) -> Any:
        return value.to(device) if hasattr(value, "to") else value

    if isinstance(batch, Mapping):
        return model(**{key: to_device(value) for key, value in batch.items()})
    return model(*map(to_device, batch)) if isinstance(batch, tuple) else model(to_device(batch))


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> "Tensor":
    """The input x of a layer, however its caller passed it."""
    x: Tensor = args[0] if args else next(iter(kwargs.values()))
    return x
