"""The changes of a tuned checkpoint other than its matrices, as far as an adapter can store them.

Biases of layers are stored as PEFT stores them. Norms, depthwise convolutions, new heads and other resized tensors are
saved in full as ``modules_to_save``, with every tensor of their module. A depthwise convolution has no pair, because
the pair would be larger than the weight and would mix its channels. Resized ``embed_tokens`` and ``lm_head`` are stored
in full without ``modules_to_save``. Changes that an adapter cannot store are listed.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import final

from loralens.core.adapter import Extra
from loralens.core.names import natural_key, some
from loralens.merging.extraction.differences import (
    CheckpointComparison,
    Tensors,
    is_depthwise,
    is_embedding,
    may_be_grouped,
    values_differ,
)

PREFIX = "base_model.model."  # PEFT's keys begin with it
RESIZED = ("embed_tokens", "lm_head")  # PEFT stores their full matrix without listing them in modules_to_save


@final
@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that differs and is not in the adapter.

    Attributes
    ----------
    key : str
        A key of the tuned checkpoint, or the name of a module.
    norm : float or None
        ‖tuned − base‖_F, if it was measured.
    """

    key: str
    why: str
    norm: float | None = None


@final
@dataclass(slots=True)
class Leftover:
    """The part of an extracted adapter other than its pairs.

    Attributes
    ----------
    extra : dict of str to Extra
        Tensors by PEFT's keys.
    saved : list of str
        Modules for ``modules_to_save``.
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
        """Save a module in full, with all of its tensors, as PEFT needs them."""
        if module in self.saved:
            return
        self.saved.append(module)
        for key, tensor in tensors.items():
            path, _, parameter = key.rpartition(".")
            if path == module:
                self.extra[PREFIX + key] = Extra("saved", module, tensor, parameter)


def collect_leftover(comparison: CheckpointComparison, adapted: Collection[str], *, drop: bool = False) -> Leftover:
    """Collect the differences other than those of matrices.

    Parameters
    ----------
    comparison : CheckpointComparison
    adapted : collection of str
        Modules that have a pair.
    drop : bool
        Store none of them, and list all as left out.
    """
    collected = Leftover()
    for key, (base, tuned) in comparison.other_tensors.items():
        if values_differ(base.read(), tuned.read()):
            _collect_changed(key, comparison, adapted, collected)
    layers = {key.rpartition(".")[0] for key in comparison.tuned if key not in comparison.added}
    for key in comparison.added:
        module = key.rpartition(".")[0]
        # A layer that is new as a whole can be saved; PEFT cannot add a tensor to an existing one.
        if module and module not in layers:
            collected.save(module, comparison.tuned)
        else:
            collected.left_out.append(LeftOut(key, "PEFT cannot add it to a layer that the base already has"))
    for key, shape in comparison.resized.items():
        _collect_resized(key, shape, comparison.tuned, collected)
    # Collected first and dropped here, so that the report still names everything.
    if drop:
        collected.left_out += [LeftOut(key.removeprefix(PREFIX), "dropped on request") for key in collected.extra]
        collected.extra, collected.saved, collected.notes = {}, [], []
    collected.saved.sort(key=natural_key)
    collected.notes += _notes(comparison, adapted)
    return collected


def _collect_changed(key: str, comparison: CheckpointComparison, adapted: Collection[str], collected: Leftover) -> None:
    """Add a tensor that differs to the collection, in the form in which PEFT stores it."""
    module, _, parameter = key.rpartition(".")
    tensor = comparison.tuned[key]
    if parameter == "bias" and (module in comparison.matrices or f"{module}.weight" not in comparison.tuned):
        # PEFT puts the original layer below `base_layer` when the module has a pair. A parameter without a layer of its
        # own may have a pair too; PEFT then wraps the module that holds it.
        parameters = [name for name in adapted if comparison.matrices[name].layout.kind == "parameter"]
        wrapped = module in adapted or any(name.rpartition(".")[0] == module for name in parameters)
        layer = f"{module}.base_layer" if wrapped else module
        collected.extra[f"{PREFIX}{layer}.bias"] = Extra("bias", module, tensor, "bias")
    elif _is_norm(module, comparison.tuned) or (parameter == "weight" and is_depthwise(tensor.shape)):
        collected.save(module, comparison.tuned)
    # A matrix that is a parameter of a module with children: see `_matrices` in `differences`.
    elif module and len(tensor.shape) == 2 and tensor.dtype.kind in "fV":
        collected.left_out.append(LeftOut(key, "belongs to a module with layers in it, and PEFT would rename them"))
    else:
        collected.left_out.append(LeftOut(key, "is not the weight of a layer, and no module can be saved for it"))


def _is_norm(module: str, tensors: Tensors) -> bool:
    """Whether a module is a norm or similar: it has a weight, and no tensor with more than one axis."""
    own = [tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == module]
    return f"{module}.weight" in tensors and all(len(tensor.shape) <= 1 for tensor in own)


def _collect_resized(key: str, shape: tuple[int, ...], tuned: Tensors, collected: Leftover) -> None:
    """Save a tensor in full because its shape in the tuned model is not its shape in the base, ``shape``."""
    module, _, parameter = key.rpartition(".")
    tensor = tuned[key]
    if parameter == "weight" and len(shape) == len(tensor.shape) == 2 and shape[1] == tensor.shape[1]:
        what = "vocabulary resized" if is_embedding(module) or module.endswith("lm_head") else "resized"
        collected.notes.append(f"{key}: {what} from {shape[0]:,} to {tensor.shape[0]:,} rows, kept in full")
    else:
        collected.notes.append(f"{key}: {shape} in the base and {tensor.shape} in the tuned model, kept in full")
    # The role decides under which key PEFT looks for the tensor.
    if module.rpartition(".")[2] in RESIZED:
        collected.extra[PREFIX + key] = Extra("embedding", module, tensor, parameter)
    else:
        collected.save(module, tuned)


def _notes(comparison: CheckpointComparison, adapted: Collection[str]) -> list[str]:
    """Notes about the comparison itself."""
    notes = [f"names match after {comparison.edit}"] if comparison.edit else []
    missing = comparison.missing
    if missing:
        notes.append(f"{len(missing)} tensors of the base are not in the tuned model: {some(missing)}")
    doubtful = sorted((name for name in adapted if may_be_grouped(comparison.matrices[name])), key=natural_key)
    if doubtful:
        what = (
            f"{len(doubtful)} convolutions are treated as ones without groups, because their shapes do not show groups"
        )
        notes.append(f"{what}: {some(doubtful)}")
    return notes
