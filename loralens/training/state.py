"""The state of a run, saved and restored bit for bit, so that a run can be resumed."""

from collections.abc import Mapping
from copy import deepcopy
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from loralens.core.lazy import Array
from loralens.core.stored import State
from loralens.core.tensors import numpy_of
from loralens.errors import FormatError, MismatchError, OptionError
from loralens.training.course import Course, optimisers_of
from loralens.training.injection import Injection

FREE = ("checkpointing",)  # fields of a course that change no number
# A run of another command differs in many fields, and the first few are enough to recognise it.
NAMED = 3  # differences that a message names
TRAINED, REMEMBERED, BEST = "trained.", "optimiser.", "best."  # prefixes of the names of tensors in a state
SET = ("params", "name", "lr")  # parts of groups that the run itself sets
STEP = "step"  # the key under which the optimisers of torch count
# What the optimisers of `loralens.training.course` remember of a parameter: its steps, and tensors of its shape.
KEPT: dict[str, frozenset[str]] = {
    "SGD": frozenset(),
    "AdamW": frozenset({STEP, "exp_avg", "exp_avg_sq"}),
    "Muon": frozenset({"momentum_buffer"}),
}
DAMAGED = "begin the run anew: --overwrite"  # the fix for every damaged state
OTHER = "resume with the state of this run, or leave the state out to begin a new one"


def run_identity(injection: Injection, course: Course, *, processes: int) -> dict[str, Any]:
    """The values that decide about the numbers of a run, except for the model, the batches and the loss, as JSON.

    The adapted layers are not included: the tensors of a state have their names.
    """
    deciding = {name: value for name, value in course.record.items() if name not in FREE}
    return {**injection.settings, "heads": list(injection.heads), **deciding, "processes": processes}


def capture_state(
    injection: Injection,
    optimiser: Optimizer,
    step: int,
    *,
    best: Mapping[str, Tensor],
    record: Mapping[str, Any],
    run: Mapping[str, Any],
    own_optimiser: bool,
) -> State:
    """The state of a run after a step. If the model is sharded, all processes must call this at the same time.

    ``own_optimiser`` says whether the caller has made the optimiser. The values of its groups belong to the state then;
    those of our own optimisers follow from the course.

    Raises
    ------
    OptionError
        The optimiser remembers an object that cannot be saved.
    """
    tensors: dict[str, Array] = {}
    values: dict[str, dict[str, Any]] = {}
    states = {parameter: kept for one in optimisers_of(optimiser) for parameter, kept in one.state.items()}
    for name, tensor in injection.tensors().items():
        tensors[TRAINED + name] = numpy_of(tensor)
        for key, value in states.get(tensor, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{REMEMBERED}{name}.{key}"] = numpy_of(value)
            else:
                values.setdefault(name, {})[key] = _plain(value)
    tensors |= {BEST + name: numpy_of(tensor) for name, tensor in best.items()}
    kept: dict[str, Any] = {"values": values} if values else {}
    if own_optimiser:
        kept["groups"] = [
            {key: _plain(value) for key, value in group.items() if key not in SET} for group in optimiser.param_groups
        ]
    return State(step, tensors, {**record, **({"optimiser": kept} if kept else {})}, dict(run))


def _plain(value: Any) -> Any:
    """A copy of a value that JSON holds; tuples become lists."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise OptionError(
        f"the optimiser keeps a {type(value).__name__}, which a state cannot hold",
        fix="choose an optimiser that keeps tensors and numbers, or save no states (--save-every)",
    )


@torch.no_grad()
def restore_state(
    injection: Injection, optimiser: Optimizer, state: State, *, run: Mapping[str, Any], own_optimiser: bool
) -> dict[str, Tensor]:
    """Copy a state into the model and the optimiser of a new run, and return the best trained tensors so far.

    ``own_optimiser`` says whether the caller has made the optimiser.

    Raises
    ------
    FormatError
        The state is damaged. Nothing has been changed, unless it is the state of a caller's optimiser.
    MismatchError
        The state is of another run, or of other modules; the message names what differs. Nothing has been changed.
    """
    # All checks come before the first write, so that a refused state leaves the model as it was.
    _check_run(state.run, run, done=state.step)
    _check_record(state, steps=run["steps"])
    tensors = injection.tensors()
    trained, remembered, best = (
        {name.removeprefix(prefix): array for name, array in state.tensors.items() if name.startswith(prefix)}
        for prefix in (TRAINED, REMEMBERED, BEST)
    )
    if odd := tensors.keys() ^ trained.keys():
        raise MismatchError(f"the state is of another run: {min(odd)} is in one of them only", fix=OTHER)
    if best.keys() != (set() if state.record["best"] is None else tensors.keys()):
        raise FormatError("the state does not hold the best tensors that it speaks of", fix=DAMAGED)
    for name, tensor in tensors.items():
        for array in (trained[name], *([best[name]] if best else [])):
            _check_shape(tensor, array, name)
            _check_numbers(tensor, array, name)
    values = state.record.get("optimiser", {})
    if not own_optimiser:
        _check_remembered(optimiser, tensors, remembered, values, done=state.step)
    for name, tensor in tensors.items():
        overwrite(tensor, trained[name], name)
    _restore_optimiser(optimiser, tensors, remembered, values)
    return {name: _tensor_like(tensors[name], array) for name, array in best.items()}


def _restore_optimiser(
    optimiser: Optimizer, tensors: Mapping[str, Tensor], arrays: Mapping[str, Array], record: Mapping[str, Any]
) -> None:
    owners: dict[Tensor, Any] = {}
    for one in optimisers_of(optimiser):
        owners |= {p: (one.state, group) for group in one.param_groups for p in group["params"]}
    # The record of an optimiser of the caller may come from a damaged file.
    try:
        for name, tensor in tensors.items():
            if tensor in owners:
                states, group = owners[tensor]
                begin = f"{name}."
                own = {key.removeprefix(begin): array for key, array in arrays.items() if key.startswith(begin)}
                kept: dict[str, Any] = {key: _place(key, array, tensor, group) for key, array in own.items()}
                kept |= deepcopy(record.get("values", {}).get(name, {}))
                if kept:
                    states[tensor] = kept
        # Copies, since an optimiser may change its values in place, and a state may be resumed again.
        for group, values in zip(optimiser.param_groups, record["groups"], strict=True) if "groups" in record else ():
            group.update(deepcopy(values))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise FormatError("the state of the optimiser is damaged", fix=DAMAGED) from error


@torch.no_grad()
def overwrite(tensor: Tensor, array: "Array | Tensor", name: str) -> None:
    """Overwrite a tensor, which may be sharded, with a whole array.

    Raises
    ------
    MismatchError
        The shapes differ.
    """
    _check_shape(tensor, array, name)
    tensor.copy_(array if isinstance(array, Tensor) else _tensor_like(tensor, array))


def _check_run(stored: Mapping[str, Any], current: Mapping[str, Any], *, done: int) -> None:
    other = [name for name in {**current, **stored} if stored.get(name) != current.get(name)]
    # A run that has done all its steps may go on with more of them.
    if "steps" in other and done == stored.get("steps") and done < current["steps"]:
        other.remove("steps")
    if other:
        differences = [f"{name} is {stored.get(name)!r} there, {current.get(name)!r} here" for name in other[:NAMED]]
        and_more = f"; and {len(other) - NAMED} more" if len(other) > NAMED else ""
        raise MismatchError(
            f"the state is of another run: {'; '.join(differences)}{and_more}",
            fix="resume with the same options, or leave the state out to begin a new run",
        )


def _check_record(state: State, *, steps: int) -> None:
    """Refuse values that no run saves, for which the loop would fail, or never end."""
    done, record = state.step, {"scale": 1.0, "scale_steps": 0, **state.record}
    best, best_step, scale = record.get("best", ...), record.get("best_step", ...), record["scale"]
    # Evaluations come before the first step too.
    counts = [done, record["scale_steps"], record.get("waited"), best_step or 0]
    sound = (
        all(type(count) is int and 0 <= count <= done + 1 for count in counts)
        and done <= steps
        and ((best is None is best_step) or (isinstance(best, float | int) and best_step is not None))
        and (isinstance(scale, float) and 0 < scale < inf)
    )
    if not sound:
        raise FormatError("the counts of steps or the best evaluation in the state are damaged", fix=DAMAGED)


def _check_shape(tensor: Tensor, array: "Array | Tensor", name: str) -> None:
    if tuple(tensor.shape) != tuple(array.shape):
        shapes = f"{tuple(array.shape)} there, {tuple(tensor.shape)} here"
        raise MismatchError(f"the state is of another run: {name} is {shapes}", fix=OTHER)


def _check_numbers(tensor: Tensor, array: Array, name: str) -> None:
    """Refuse an array of another dtype than its tensor's, or with NaN, which no run saves."""
    if array.dtype.name != str(tensor.dtype).removeprefix("torch."):
        raise FormatError(f"{name} is {array.dtype} in the state and {tensor.dtype} in this run", fix=DAMAGED)
    if tensor.is_floating_point() and np.isnan(array).any():
        raise FormatError(f"{name} holds NaN in the state", fix=DAMAGED)


def _check_remembered(
    optimiser: Optimizer,
    tensors: Mapping[str, Tensor],
    arrays: Mapping[str, Array],
    record: Mapping[str, Any],
    *,
    done: int,
) -> None:
    """Refuse a state that one of our own optimisers cannot have after so many steps.

    torch checks nothing: it would fail in the next step, or compute with arrays of another shape.
    """
    parts = optimisers_of(optimiser)
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
            _check_numbers(tensor, array, stored)
            # The second moment is a mean of squares, and its root is taken.
            sound = array.shape == tuple(tensor.shape) and not (key == "exp_avg_sq" and bool((array < 0).any()))
        if not sound:
            raise FormatError(f"the state of the optimiser is damaged: {stored} is not what it remembers", fix=DAMAGED)
    for name, keys in found.items():
        if lost := kept[tensors[name]] - keys:
            raise FormatError(f"the state of the optimiser is damaged: {name}.{min(lost)} is missing", fix=DAMAGED)


def _tensor_like(tensor: Tensor, array: Array) -> Tensor:
    """An array as a tensor on the device of another one, sharded if that is."""
    # torch does not know ml_dtypes, so that bits are passed on as int16; and it takes no read-only memory.
    is_bfloat16 = array.dtype.name == "bfloat16"
    values = torch.from_numpy((array.view("int16") if is_bfloat16 else array).copy())
    values = values.view(torch.bfloat16) if is_bfloat16 else values
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return values.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(mesh.device_type), mesh, tensor.placements)  # type: ignore[attr-defined]


def _place(key: str, value: Array, tensor: Tensor, group: Mapping[str, Any]) -> Tensor:
    # torch's optimisers count steps on the CPU, unless one kernel updates everything on the device.
    if key == STEP and not (group.get("fused") or group.get("capturable")):
        return torch.from_numpy(value.copy())
    return _tensor_like(tensor, value)
