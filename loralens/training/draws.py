"""The random numbers of batches: drawn from the caller's generators, and kept apart from those of the training.

A `DataLoader` that shuffles, and data that are augmented, draw from the global generators of torch, NumPy and Python.
The training seeds that of torch anew in every step. If batches were drawn from it too, they would ignore the caller's
seed, and a run that is resumed would see other batches.
"""

# ruff: noqa: NPY002 - the generator of NumPy that callers seed is the global one

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from math import isnan, nan
from typing import Any, final

import numpy as np
import torch

from loralens.core.lazy import Array
from loralens.errors import MismatchError

# NumPy's global generator is of this kind, unless the caller has replaced it by one whose state has another form.
MERSENNE = "MT19937"
CPU = torch.device("cpu")


@final
class BatchGenerators:
    """The generators from which batches are drawn, with states of their own.

    Parameters
    ----------
    own : sequence of torch.Generator
        Generators that the batches have besides the global ones, such as that of a `DataLoader`.
    device : torch.device
        The device of the model. On CUDA its generator is one of the global ones.

    Notes
    -----
    The first states are those at the time of construction. Outside of `drawing` no generator is changed.
    """

    def __init__(self, own: Sequence[torch.Generator] = (), device: torch.device = CPU) -> None:
        self._own = tuple(own)
        self._device = device if device.type == "cuda" else None
        self._first = self._now = self._states()
        self._digest = _digest(self.first)

    @property
    def first(self) -> dict[str, Array]:
        """The states with which the run began, as arrays that can be saved."""
        return _encode(self._first)

    def begin(self, first: Mapping[str, Array]) -> None:
        """Begin with saved states; a generator that is not among them keeps its own.

        Raises
        ------
        MismatchError
            An array is not the state of its generator.
        """
        outside = self._states()
        try:
            states = {**self._first, **_decode({name: first[name] for name in self._first if name in first})}
            self._set(states)
        # A state may come from a damaged file; torch, NumPy and Python each raise a different error for it.
        except (ValueError, TypeError, RuntimeError, OverflowError, IndexError) as error:
            raise MismatchError(
                f"the state holds no generators that batches could be drawn from: {error}",
                fix="resume with the state of this run, or leave the state out to begin a new run",
            ) from error
        finally:
            self._set(outside)
        self._first = self._now = states
        self._digest = _digest(self.first)

    def part(self, rank: int) -> None:
        """Draw other numbers in every process but the first, for batches that are divided among processes already."""
        if rank:
            with self._restoring_states():
                self._seed(f"process\0{rank}")
                self._now = self._states()

    @contextmanager
    def drawing(self, number: int | None = None) -> Iterator[None]:
        """Within the context, the generators continue where the last batch has left them.

        With a number their states depend on it and on the first states alone, for batches that are asked for by number.
        """
        with self._restoring_states():
            if number is None:
                self._set(self._now)
            else:
                self._seed(f"batch\0{number}")
            yield
            if number is None:
                self._now = self._states()

    @contextmanager
    def _restoring_states(self) -> Iterator[None]:
        """After the block, restore the states that the generators had before it."""
        outside = self._states()
        try:
            yield
        finally:
            self._set(outside)

    def _states(self) -> dict[str, Any]:
        numpy_state: Any = np.random.get_state(legacy=False)
        states = {"python": random.getstate(), "torch": torch.default_generator.get_state()}
        if numpy_state["bit_generator"] == MERSENNE:
            states["numpy"] = numpy_state
        if self._device is not None:
            states["cuda"] = torch.cuda.get_rng_state(self._device)
        return states | {f"own{i}": generator.get_state() for i, generator in enumerate(self._own)}

    def _set(self, states: Mapping[str, Any]) -> None:
        random.setstate(states["python"])
        torch.default_generator.set_state(states["torch"])
        if "numpy" in states:
            np.random.set_state(states["numpy"])
        if self._device is not None:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        for i, generator in enumerate(self._own):
            generator.set_state(states[f"own{i}"])

    def _seed(self, key: str) -> None:
        """Seed all generators from the first states and a key."""
        # 7 bytes, since torch takes a seed of at most 64 bits.
        seed = int.from_bytes(sha256(self._digest + key.encode()).digest()[:7], "little")
        random.seed(seed)
        np.random.seed(seed % 2**32)  # which takes no more bits
        torch.default_generator.manual_seed(seed)
        if self._device is not None:
            with torch.cuda.device(self._device):
                torch.cuda.manual_seed(seed)
        for i, generator in enumerate(self._own):
            generator.manual_seed(seed + i + 1)  # other numbers than those of the global generator


def _digest(states: Mapping[str, Array]) -> bytes:
    return sha256(b"".join(name.encode() + array.tobytes() for name, array in states.items())).digest()


def _encode(states: Mapping[str, Any]) -> dict[str, Array]:
    """States as arrays. float64 holds the words of 32 bits of Python and NumPy exactly."""
    arrays: dict[str, Array] = {}
    for name, state in states.items():
        if name == "python":
            _, words, gauss = state
            arrays[name] = np.array([*words, nan if gauss is None else gauss])
        elif name == "numpy":
            inner = state["state"]
            arrays[name] = np.array([*inner["key"], inner["pos"], state["has_gauss"], state["gauss"]])
        else:
            arrays[name] = state.cpu().numpy().copy()
    return arrays


def _decode(arrays: Mapping[str, Array]) -> dict[str, Any]:
    """The states of arrays that `_encode` made."""
    states: dict[str, Any] = {}
    for name, array in arrays.items():
        if name == "python":
            gauss = float(array[-1])
            states[name] = (3, tuple(int(word) for word in array[:-1]), None if isnan(gauss) else gauss)
        elif name == "numpy":
            inner = {"key": array[:-3].astype(np.uint32), "pos": int(array[-3])}
            states[name] = {
                "bit_generator": MERSENNE, "state": inner, "has_gauss": int(array[-2]), "gauss": float(array[-1])
            }  # fmt: skip
        else:
            states[name] = torch.from_numpy(array.copy())
    return states
