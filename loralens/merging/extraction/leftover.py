"""What a tuned checkpoint changed besides matrices, as far as an adapter can hold it.

Biases of layers ride along as PEFT keeps them; a norm, a depthwise convolution (a pair would be larger than its weight
and mix its channels), a new head or a resized embedding is saved in full, as ``modules_to_save``, with every tensor of
its module. What has no place is named.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import final

from loralens.core.adapter import Extra
from loralens.core.names import natural_key
from loralens.merging.extraction.differences import Comparison, Tensors, is_depthwise, is_embedding, perhaps_grouped

PREFIX = "base_model.model."  # of PEFT's keys
RESIZED = ("embed_tokens", "lm_head")  # whose full matrix PEFT keeps without naming them in modules_to_save


@final
@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that differs and is not in the adapter.

    Attributes
    ----------
    key : str
        A key of the tuned checkpoint, or the name of a module.
    why : str
    norm : float or None
        ‖tuned − base‖_F where it was measured.
    """

    key: str
    why: str
    norm: float | None = None


@final
@dataclass(slots=True)
class Leftover:
    """Everything but pairs.

    Attributes
    ----------
    extra : dict of str to Extra
        By PEFT's keys.
    saved : list of str
        Modules for ``modules_to_save``.
    left_out : list of LeftOut
    notes : list of str
    """

    extra: dict[str, Extra] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def biases(self) -> bool:
        """Whether biases of layers are among the extras."""
        return any(extra.role == "bias" for extra in self.extra.values())

    def save(self, module: str, tensors: Tensors) -> None:
        """Keep a module in full: PEFT wants every tensor of it."""
        if module in self.saved:
            return
        self.saved.append(module)
        for key, tensor in tensors.items():
            path, _, parameter = key.rpartition(".")
            if path == module:
                self.extra[PREFIX + key] = Extra("saved", module, tensor, parameter)


def leftover(comparison: Comparison, adapted: Collection[str], *, drop: bool = False) -> Leftover:
    """What differs besides the matrices.

    Parameters
    ----------
    comparison : Comparison
    adapted : collection of str
        Modules that have a pair.
    drop : bool
        Keep nothing of it: all of it is left out, by name.
    """
    found = Leftover()
    changed = [key for key, other in comparison.others.items() if other.differs()]
    for key in changed:
        _changed(key, comparison, adapted, found)
    layers = {key.rpartition(".")[0] for key in comparison.tuned if key not in comparison.added}
    for key in comparison.added:
        module = key.rpartition(".")[0]
        if module and module not in layers:
            found.save(module, comparison.tuned)
        else:
            found.left_out.append(LeftOut(key, "the base has a layer of that name without it"))
    for key, shape in comparison.resized.items():
        _resized(key, shape, comparison.tuned, found)
    if drop:
        found.left_out += [LeftOut(key.removeprefix(PREFIX), "dropped, as asked for") for key in found.extra]
        found.extra, found.saved, found.notes = {}, [], []
    found.saved.sort(key=natural_key)
    found.notes += _notes(comparison, adapted)
    return found


def _changed(key: str, comparison: Comparison, adapted: Collection[str], found: Leftover) -> None:
    """Put a tensor of both that differs where it belongs."""
    module, _, parameter = key.rpartition(".")
    tensor = comparison.tuned[key]
    if parameter == "bias" and (module in comparison.matrices or f"{module}.weight" not in comparison.tuned):
        wrapped = module in adapted or any(name.rpartition(".")[0] == module for name in _bare(comparison, adapted))
        layer = f"{module}.base_layer" if wrapped else module
        found.extra[f"{PREFIX}{layer}.bias"] = Extra("bias", module, tensor, "bias")
    elif _small(module, comparison.tuned) or (parameter == "weight" and is_depthwise(tensor.shape)):
        found.save(module, comparison.tuned)
    elif module and len(tensor.shape) == 2 and tensor.dtype.kind in "fV":
        found.left_out.append(LeftOut(key, "stands in a module with layers of its own, which PEFT renames"))
    else:
        found.left_out.append(LeftOut(key, "is no weight of a layer, and no module can be saved for it"))


def _bare(comparison: Comparison, adapted: Collection[str]) -> list[str]:
    """Parameters without a layer of their own that have a pair: PEFT wraps the module that holds them."""
    return [name for name in adapted if comparison.matrices[name].layout.kind == "parameter"]


def _small(module: str, tensors: Tensors) -> bool:
    """Whether a module is a norm or the like: a weight, and nothing with more than one axis."""
    own = [tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == module]
    return f"{module}.weight" in tensors and all(len(tensor.shape) <= 1 for tensor in own)


def _resized(key: str, shape: tuple[int, ...], tuned: Tensors, found: Leftover) -> None:
    """Keep a tensor in full that has this shape in the base, and another one now."""
    module, _, parameter = key.rpartition(".")
    tensor = tuned[key]
    if parameter == "weight" and len(shape) == len(tensor.shape) == 2 and shape[1] == tensor.shape[1]:
        what = "vocabulary resized" if is_embedding(module) or module.endswith("lm_head") else "resized"
        found.notes.append(f"{key}: {what} from {shape[0]:,} to {tensor.shape[0]:,} rows, kept in full")
    else:
        found.notes.append(f"{key}: {shape} in the base and {tensor.shape} in the tuned model, kept in full")
    if module.rpartition(".")[2] in RESIZED:
        found.extra[PREFIX + key] = Extra("embedding", module, tensor, parameter)
    else:
        found.save(module, tuned)


def _notes(comparison: Comparison, adapted: Collection[str]) -> list[str]:
    """What to say of the comparison itself."""
    notes = [f"names match after {comparison.edit}"] if comparison.edit else []
    missing = comparison.missing
    if missing:
        notes.append(f"{len(missing)} tensors of the base are not in the tuned model: {_first(missing)}")
    doubtful = sorted((name for name in adapted if perhaps_grouped(comparison.matrices[name])), key=natural_key)
    if doubtful:
        what = f"{len(doubtful)} convolutions are taken for ones without groups, as their shapes do not tell"
        notes.append(f"{what}: {_first(doubtful)}")
    return notes


def _first(names: Sequence[str]) -> str:
    """Three of them, in words."""
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
