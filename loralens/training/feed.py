"""The batches of a run by number, so that a run can start at any step and processes can share them.

Batches are drawn from the caller's generators, apart from the random numbers of the training: a `DataLoader` that
shuffles, and data that are augmented, draw from the global generators of torch, NumPy and Python. The training seeds
that of torch anew in every step. If batches were drawn from it too, they would ignore the caller's seed, and a run that
is resumed would see other batches.
"""

# ruff: noqa: NPY002 - the generator of NumPy that callers seed is the global one

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import count, islice
from math import ceil, isnan, nan
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from loralens.core.lazy import Array
from loralens.errors import MismatchError, OptionError
from loralens.training.world import World

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


GROUPED = 50  # batches whose examples are sorted by length together, as in transformers

Batches = Iterable[Any] | Callable[[int], Any]


@final
class Feed:
    """The batches of a process: the turns 0, 1, 2 … of a run.

    Parameters
    ----------
    batches : sequence, iterable or callable
        A sequence is repeated in its order. Any other iterable, such as a `DataLoader`, is iterated anew for every
        round, so a round may differ from the one before; a run that is resumed skips the batches that it has seen. A
        callable is asked once for every number, which is how batches are shuffled: see `shuffle_order`.
    world : World
        The processes that share the batches: in turn t process k of n takes batch n · t + k. A `DataLoader` with a
        `DistributedSampler`, or one that accelerate has prepared, has only the batches of its own process, which takes
        all of them; the epoch of the sampler rises with every round.
    device : torch.device
        The device of the model, whose generator batches may be drawn from.

    Notes
    -----
    Batches are drawn under the states that the global generators have when this object is made, in every process those
    of the first one. See `loralens.training.feed`.

    Raises
    ------
    OptionError
        The argument is none of these; a sampler divides the data among other processes.
    """

    def __init__(self, batches: Batches, *, world: World | None = None, device: torch.device = CPU) -> None:
        if not (isinstance(batches, Iterable) or callable(batches)):
            what = f"batches {batches!r} is neither iterable nor callable"
            raise OptionError(what, fix="give a list of batches, an iterable, or a function of the batch's number")
        self._batches, self._world = batches, world or World()
        samplers = _samplers_of(batches)
        divided = [(part, place) for part in (*samplers, *_other_parts(batches)) if (place := _place_in(part))]
        self._sampler: Any = divided[0][0] if divided else None
        self._epoch = getattr(self._sampler, "epoch", 0)
        if divided:
            self._check_place(*divided[0][1])
        generators = [getattr(one, "generator", None) for one in (batches, *samplers)]
        # Each once: a DataLoader shares its generator with its sampler.
        own = {id(one): one for one in generators if isinstance(one, torch.Generator)}
        self._draws = BatchGenerators(tuple(own.values()), device)
        self.begin(self._draws.first)
        self._stream: Iterator[Any] | None = None
        self._next = 0

    def _check_place(self, processes: int, process: int) -> None:
        """Refuse batches that are divided among other processes than those that train."""
        size, rank = self._world.size, self._world.rank
        if processes != size:
            trains = "1 trains" if size == 1 else f"{size} train"
            what = f"the sampler of the batches divides the data among {processes} processes, and {trains}"
        elif process != rank:
            what = f"the sampler of the batches is that of process {process}, and this is process {rank}"
        else:
            return
        fix = "leave num_replicas and rank out of the DistributedSampler, and make it in the processes that train"
        raise OptionError(what, fix=fix)

    def begin(self, first: Mapping[str, Array]) -> None:
        """Draw batches under these states of the generators, those of the first process; before the first batch.

        Raises
        ------
        MismatchError
            They are not the states of the generators.
        """
        self._draws.begin(self._world.from_main(lambda: first))
        if self.divided:
            self._draws.part(self._world.rank)

    def close(self) -> None:
        """Leave the sampler as it was before the run."""
        if self._sampler is not None and hasattr(self._sampler, "set_epoch"):
            self._sampler.set_epoch(self._epoch)

    @property
    def first_draws(self) -> dict[str, Array]:
        """The states of the generators with which the run began, for its `State`."""
        return self._draws.first

    @property
    def divided(self) -> bool:
        """Whether each process has batches of its own, instead of sharing the same batches."""
        return self._sampler is not None

    @property
    def length(self) -> int | None:
        """The number of turns in a round over the batches; None where it is not known in advance."""
        if callable(self._batches) and not isinstance(self._batches, Iterable):
            return None
        try:
            length = len(self._batches)  # type: ignore[arg-type]
        # A DataLoader of an IterableDataset has a method for its length, which raises this too.
        except TypeError:
            return None
        # Rounded up, so that every batch comes once; the last turn may begin the next round.
        return length if self.divided else ceil(length / self._world.size)

    def __getitem__(self, turn: int) -> Any:
        """The batch of this process in a turn. Turns must rise if the batches are an iterable that is no sequence."""
        return self._batch(turn if self.divided else turn * self._world.size + self._world.rank)

    def _batch(self, number: int) -> Any:
        """The batch of a number."""
        if isinstance(self._batches, Sequence):
            if not self._batches:
                raise _no_batches()
            place = number % len(self._batches)
            # These draw nothing, and 0.2 ms to set the generators is half of a step of a tiny model.
            if type(self._batches) in (list, tuple):
                return self._batches[place]
            with self._draws.drawing(number):
                return self._batches[place]
        if callable(self._batches):
            with self._draws.drawing(number):
                return self._batches(number)
        with self._draws.drawing():
            return self._next_streamed(number)

    def _next_streamed(self, number: int) -> Any:
        assert number >= self._next, "an iterable cannot go back"
        if self._stream is None:
            self._stream = self._rounds()
        batch = next(islice(self._stream, number - self._next, None))
        self._next = number + 1
        return batch

    def _rounds(self) -> Iterator[Any]:
        assert isinstance(self._batches, Iterable)
        for round_ in count():
            # Otherwise every round would have the same order.
            if self._sampler is not None and hasattr(self._sampler, "set_epoch"):
                self._sampler.set_epoch(self._epoch + round_)
            empty = True
            for batch in self._batches:
                empty = False
                yield batch
            # A generator is exhausted after its first round: iterating it again would loop for ever.
            if empty:
                raise _no_batches()


def _samplers_of(batches: Any) -> list[Any]:
    """The samplers of a `DataLoader`, the outer ones first; those of one that takes whole batches are nested."""
    samplers: list[Any] = []
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(batches, name, None)
        if sampler is not None:
            samplers += [sampler, *_samplers_of(sampler)]
    return samplers


def _other_parts(batches: Any) -> list[Any]:
    """What may divide the batches of a loader besides its samplers: its data, or the loader itself."""
    # accelerate's loader that reads in the first process alone knows its place by a state.
    return [part for name in ("dataset", "state") if (part := getattr(batches, name, None)) is not None]


def _place_in(part: Any) -> tuple[int, int] | None:
    """The number of processes among which a part of a loader divides the data, and the number of its own process.

    None for what divides nothing.
    """
    # The attributes tell, since libraries have samplers of this kind that are not subclasses of torch's: torch's
    # `DistributedSampler` has the first pair, and what accelerate's `prepare` makes the second.
    for count_name, own_name in (("num_replicas", "rank"), ("num_processes", "process_index")):
        places = getattr(part, count_name, None), getattr(part, own_name, None)
        if isinstance(places[0], int) and isinstance(places[1], int):
            return places[0], places[1]
    return None


def _no_batches() -> OptionError:
    return OptionError("there are no more batches", fix="give a list of batches, or an iterable that can begin again")


def shuffle_order(
    count: int, *, size: int, seed: int, lengths: Sequence[int] | None = None
) -> Callable[[int], list[int]]:
    """A function from the number of a batch to the examples in it: each of ``count`` examples once in every round.

    The order of a round is a permutation that depends only on the seed and on the number of the round. All batches have
    ``size`` examples, since a batch may contain the end of one round and the start of the next. With ``lengths`` the
    examples of a batch have similar lengths, so that little of it is padding.

    Raises
    ------
    OptionError
        There are no examples.
    """
    if count < 1:
        raise OptionError("there are no examples", fix="give at least one example")
    orders: dict[int, Any] = {}  # the last two rounds: a batch may lie in both

    def order(round_: int) -> Any:
        if round_ not in orders:
            # Philox, since its key holds two numbers: the orders of two rounds, and of two seeds, are independent.
            generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, round_]))
            permutation = generator.permutation(count)
            orders[round_] = permutation if lengths is None else _group_by_length(permutation, lengths, size, generator)
            # A run asks for rising numbers, so older rounds are never needed again.
            for old in [known for known in orders if abs(known - round_) > 1]:
                del orders[old]
        return orders[round_]

    def batch(number: int) -> list[int]:
        places = range(number * size, (number + 1) * size)
        return [int(order(place // count)[place % count]) for place in places]

    return batch


def _group_by_length(permutation: Any, lengths: Sequence[int], size: int, generator: np.random.Generator) -> Any:
    """A permutation in which runs of ``size`` examples have similar lengths, and the runs are in random order."""
    sizes = np.asarray(lengths)
    runs: list[Any] = []
    # Parts of a permutation are sorted, and not all of it, so that runs differ from round to round.
    for start in range(0, len(permutation), GROUPED * size):
        part = permutation[start : start + GROUPED * size]
        part = part[np.argsort(-sizes[part], kind="stable")]
        runs += [part[place : place + size] for place in range(0, len(part), size)]
    # What is left over is last, so that all other runs are whole batches.
    last = runs.pop() if len(runs[-1]) < size else None
    shuffled = [runs[place] for place in generator.permutation(len(runs))]
    return np.concatenate([*shuffled, *([] if last is None else [last])])


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, also those inside mappings, tuples (named tuples too) and lists."""
    if isinstance(batch, Tensor):
        # non_blocking lets a copy from pinned memory run beside the computation; otherwise it changes nothing.
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: move_batch(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [move_batch(value, device) for value in batch]
        # A named tuple takes its fields one by one, unlike a tuple.
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def size_of(batch: Any) -> int:
    """The number of tokens if the batch has an attention mask, else of examples; 0 where neither is known."""
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)


def length_of(batch: Any) -> int:
    """The number of tokens of the longest text of a batch, with padding; 0 for a batch that holds no tokens."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return int(ids.shape[-1]) if isinstance(ids, Tensor) and ids.ndim else 0
