"""What an optimiser remembers, as arrays and JSON, so that a run with any optimiser resumes bit for bit.

It is what torch itself puts into ``state_dict``: the state of every parameter, and the values of the parameter groups,
in which some optimisers count steps or estimate a rate. Tensors, numbers, texts, and lists and mappings of these are
saved; nothing is pickled.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from loralens.core.lazy import Array
from loralens.errors import FormatError, OptionError

NumpyOf = Callable[[Tensor], Array]
TensorLike = Callable[[Tensor, Array], Tensor]
# Values of groups that the run itself sets, and the parameters.
SET = ("params", "name", "lr")
STEP = "step"  # the key under which the optimisers of torch count
# What the optimisers of `loralens.training.optimisers` remember of a parameter: its steps, and tensors of its shape.
KEPT: dict[str, frozenset[str]] = {
    "SGD": frozenset(),
    "AdamW": frozenset({STEP, "exp_avg", "exp_avg_sq"}),
    "Muon": frozenset({"momentum_buffer"}),
}
DAMAGED = "begin the run anew: --overwrite"  # the fix for every damaged state


def capture_optimiser(
    optimiser: Optimizer, tensors: Mapping[str, Tensor], *, groups: bool, numpy_of: NumpyOf
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Everything that an optimiser remembers: arrays by name, and a record for JSON, which is empty for those of torch.

    Parameters
    ----------
    optimiser : Optimizer
    tensors : mapping of str to tensor
        The parameters by name.
    groups : bool
        Whether the values of the parameter groups belong to the state. Those of our own optimisers follow from the
        course.
    numpy_of : callable
        Copies a tensor to an array.

    Raises
    ------
    OptionError
        The optimiser remembers an object that cannot be saved.
    """
    saver = _Saver(numpy_of)
    values: dict[str, Any] = {}
    for name, tensor in tensors.items():
        for key, value in (optimiser.state.get(tensor) or {}).items():
            plain = isinstance(value, Tensor) and isinstance(key, str)
            # Tensors of a state keep their own names, which older releases wrote too.
            entry = saver.save(f"{name}.{key}", value)
            if not plain or _stays(value, tensor, key):
                values.setdefault(name, []).append([key, entry, _stays(value, tensor, key)])
    record: dict[str, Any] = {"values": values} if values else {}
    if groups:
        record["groups"] = [
            {key: saver.save(f"group{number}.{key}", value) for key, value in group.items() if key not in SET}
            for number, group in enumerate(optimiser.param_groups)
        ]
    return saver.arrays, record


def _stays(value: Any, tensor: Tensor, key: str) -> bool:
    """Whether a tensor of a state is on the CPU although its parameter is not, and is not a count of torch's."""
    return isinstance(value, Tensor) and key != STEP and value.device.type == "cpu" != tensor.device.type


def check_remembered(
    optimiser: Optimizer,
    tensors: Mapping[str, Tensor],
    arrays: Mapping[str, Array],
    record: Mapping[str, Any],
    *,
    done: int,
) -> None:
    """Refuse a state that one of our own optimisers cannot have after so many steps.

    torch checks nothing: it would fail in the next step, or compute with arrays of another shape.

    Raises
    ------
    FormatError
        The state is damaged; the message names the first faulty part.
    """
    parts = getattr(optimiser, "optimisers", [optimiser])
    kept = {p: KEPT[type(one).__name__] for one in parts for group in one.param_groups for p in group["params"]}
    found: dict[str, set[str]] = {}
    for stored, array in arrays.items():
        name, _, key = stored.rpartition(".")
        tensor = tensors.get(name)
        if record or tensor is None or key not in kept.get(tensor, ()):
            raise FormatError(f"the state of the optimiser is damaged: it has {stored!a:.200}", fix=DAMAGED)
        found.setdefault(name, set()).add(key)
        if key == STEP:
            # float64 where that is torch's default.
            sound = array.shape == () and array.dtype.name in ("float32", "float64") and bool(0 < array <= done)
        else:
            check_numbers(tensor, array, stored)
            # The second moment is a mean of squares, and its root is taken.
            sound = array.shape == tuple(tensor.shape) and not (key == "exp_avg_sq" and bool((array < 0).any()))
        if not sound:
            raise FormatError(f"the state of the optimiser is damaged: {stored} is not what it remembers", fix=DAMAGED)
    for name, keys in found.items():
        if lost := kept[tensors[name]] - keys:
            raise FormatError(f"the state of the optimiser is damaged: {name}.{min(lost)} is missing", fix=DAMAGED)


def check_numbers(tensor: Tensor, array: Array, name: str) -> None:
    """Refuse an array of another dtype than its tensor's, or with NaN, which no run saves.

    Raises
    ------
    FormatError
    """
    if array.dtype.name != str(tensor.dtype).removeprefix("torch."):
        what = f"{name} is {array.dtype} in the state and {tensor.dtype} in this run"
    elif tensor.is_floating_point() and np.isnan(array).any():
        what = f"{name} holds NaN in the state"
    else:
        return
    raise FormatError(what, fix=DAMAGED)


def restore_optimiser(
    optimiser: Optimizer,
    tensors: Mapping[str, Tensor],
    arrays: Mapping[str, Array],
    record: Mapping[str, Any],
    *,
    like: TensorLike,
) -> None:
    """Give an optimiser what `capture_optimiser` has saved.

    Parameters
    ----------
    optimiser : Optimizer
    tensors : mapping of str to tensor
        The parameters by name.
    arrays, record : mapping
        What was saved.
    like : callable
        Makes a tensor of an array, on the device of another one.
    """
    groups = {parameter: group for group in optimiser.param_groups for parameter in group["params"]}
    try:
        for name, tensor in tensors.items():
            if tensor not in groups:
                continue
            begin = f"{name}."
            state: dict[Any, Any] = {
                key.removeprefix(begin): _place(key.removeprefix(begin), value, tensor, groups[tensor], like)
                for key, value in arrays.items()
                if key.startswith(begin) and "/" not in key
            }
            for key, entry, stays in record.get("values", {}).get(name, ()):
                state[key] = _load(entry, arrays, torch.empty(0) if stays else tensor, like)
            if state:
                optimiser.state[tensor] = state
        for number, values in enumerate(record.get("groups", ())):
            group = optimiser.param_groups[number]
            group.update({key: _load(value, arrays, group["params"][0], like) for key, value in values.items()})
    # The record may come from a damaged file.
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError("the state of the optimiser is damaged", fix=DAMAGED) from error


def _place(key: str, value: Array, tensor: Tensor, group: Mapping[str, Any], like: TensorLike) -> Tensor:
    # torch's optimisers count steps on the CPU, unless one kernel updates everything on the device.
    if key == STEP and not (group.get("fused") or group.get("capturable")):
        return torch.from_numpy(value.copy())
    return like(tensor, value)


class _Saver:
    """Turns values into JSON, with tensors as arrays beside it."""

    def __init__(self, numpy_of: NumpyOf) -> None:
        self.arrays: dict[str, Array] = {}
        self._numpy_of = numpy_of

    def save(self, name: str, value: Any) -> Any:
        """The JSON of a value; its tensors are in ``arrays`` under names that begin with ``name``."""
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        if isinstance(value, Tensor):
            self.arrays[name] = self._numpy_of(value)
            return {"tensor": name}
        if isinstance(value, list | tuple):
            items = [self.save(f"{name}/{i}", item) for i, item in enumerate(value)]
            return {"tuple" if isinstance(value, tuple) else "list": items}
        if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
            return {"mapping": [[key, self.save(f"{name}/{key}", item)] for key, item in value.items()]}
        raise OptionError(
            f"the optimiser keeps a {type(value).__name__} for {name}, which a state cannot hold",
            fix="choose an optimiser that keeps tensors and numbers, or save no states (--save-every)",
        )


def _load(entry: Mapping[str, Any], arrays: Mapping[str, Array], tensor: Tensor, like: TensorLike) -> Any:
    ((kind, content),) = entry.items()
    if kind == "value":
        return content
    if kind == "tensor":
        return like(tensor, arrays[content])
    if kind == "mapping":
        return {key: _load(value, arrays, tensor, like) for key, value in content}
    items = [_load(value, arrays, tensor, like) for value in content]
    return tuple(items) if kind == "tuple" else items
