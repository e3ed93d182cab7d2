"""The state of a run, saved and restored bit for bit, so that a run can be resumed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from loralens.core.lazy import Array
from loralens.core.stored import State
from loralens.core.tensors import numpy_of
from loralens.errors import FormatError, MismatchError
from loralens.training.course import Course, optimisers_of
from loralens.training.injection import Injection

FREE = ("checkpointing",)  # fields of a course that change no number
# A run of another command differs in many fields, and the first few are enough to recognise it.
NAMED = 3  # differences that a message names
TRAINED, REMEMBERED, BEST = "trained.", "optimiser.", "best."  # prefixes of the names of tensors in a state
STEP = "step"  # the key under which the optimisers of torch count
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
) -> State:
    """The state of a run after a step. If the model is sharded, all processes must call this at the same time."""
    tensors: dict[str, Array] = {}
    states = {parameter: kept for one in optimisers_of(optimiser) for parameter, kept in one.state.items()}
    for name, tensor in injection.tensors().items():
        tensors[TRAINED + name] = numpy_of(tensor)
        tensors |= {f"{REMEMBERED}{name}.{key}": numpy_of(value) for key, value in states.get(tensor, {}).items()}
    tensors |= {BEST + name: numpy_of(tensor) for name, tensor in best.items()}
    return State(step, tensors, dict(record), dict(run))


@torch.no_grad()
def restore_state(
    injection: Injection, optimiser: Optimizer, state: State, *, run: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Copy a state into the model and the optimiser of a new run, and return the best trained tensors so far.

    Raises
    ------
    FormatError
        The state is damaged.
    MismatchError
        The state is of another run, or of other modules; the message names what differs. Nothing has been changed.
    """
    _check_run(state.run, run, done=state.step)
    tensors = injection.tensors()
    trained, remembered, best = (
        {name.removeprefix(prefix): array for name, array in state.tensors.items() if name.startswith(prefix)}
        for prefix in (TRAINED, REMEMBERED, BEST)
    )
    counts = (state.step, state.record.get("waited"))
    if "best" not in state.record or any(type(n) is not int or not 0 <= n <= run["steps"] + 1 for n in counts):
        raise FormatError("the counts of steps or the best evaluation in the state are damaged", fix=DAMAGED)
    for arrays in (trained, best) if best else (trained,):
        if odd := tensors.keys() ^ arrays.keys():
            raise MismatchError(f"the state is of another run: {min(odd)} is in one of them only", fix=OTHER)
        for name, tensor in tensors.items():
            _check_shape(tensor, arrays[name], name)
    owners = {
        p: (one, group) for one in optimisers_of(optimiser) for group in one.param_groups for p in group["params"]
    }
    for stored, array in remembered.items():
        name, _, key = stored.rpartition(".")
        owned = tensors.get(name)
        # torch checks nothing: it would fail in the next step.
        if owned is None or owned not in owners or array.shape != (() if key == STEP else owned.shape):
            raise FormatError(f"the state of the optimiser is damaged: it has {stored!a:.200}", fix=DAMAGED)
        one, group = owners[owned]
        one.state[owned][key] = _place(key, array, owned, group)
    for name, tensor in tensors.items():
        overwrite(tensor, trained[name], name)
    return {name: _tensor_like(tensors[name], array) for name, array in best.items()}


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


def _check_shape(tensor: Tensor, array: "Array | Tensor", name: str) -> None:
    if tuple(tensor.shape) != tuple(array.shape):
        shapes = f"{tuple(array.shape)} there, {tuple(tensor.shape)} here"
        raise MismatchError(f"the state is of another run: {name} is {shapes}", fix=OTHER)


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
