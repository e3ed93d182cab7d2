"""The batches of a run by number, so that a run can start at any step and processes can share them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, islice
from math import ceil
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from loralens.errors import OptionError
from loralens.training.world import World

CPU = torch.device("cpu")
GROUPED = 50  # batches whose examples are sorted by length together, as in transformers

Batches = Iterable[Any] | Callable[[int], Any]


@final
class Feed:
    """The batches of a process: the turns 0, 1, 2 … of a run.

    A sequence is repeated in its order. Any other iterable, such as a `DataLoader`, is iterated anew for every round,
    so a round may differ from the one before; a run that is resumed skips the batches that it has seen. A callable is
    asked once for every number, which is how batches are shuffled: see `shuffle_order`. In turn t process k of n takes
    batch n · t + k.

    Raises
    ------
    OptionError
        The argument is none of these, or it divides its data among processes itself.
    """

    def __init__(self, batches: Batches, *, world: World | None = None, device: torch.device = CPU) -> None:
        if not (isinstance(batches, Iterable) or callable(batches)):
            what = f"batches {batches!r} is neither iterable nor callable"
            raise OptionError(what, fix="give a list of batches, an iterable, or a function of the batch's number")
        self._batches, self._world, self._device = batches, world or World(), device
        part: Any = batches
        # The attributes of torch's DistributedSampler and of what accelerate prepares.
        while part is not None:
            if max(getattr(part, "num_replicas", 1), getattr(part, "num_processes", 1)) > 1:
                what = "the sampler of the batches divides the data among processes, which a run does itself"
                raise OptionError(
                    what, fix="give every process all batches: leave out DistributedSampler and prepare()"
                )
            part = getattr(part, "batch_sampler", None) or getattr(part, "sampler", None)
        self._first: list[Any] = []  # batches that were looked at before the run
        self._stream: Iterator[Any] | None = None
        self._next = 0
        # Only batches that depend on nothing but their number can be made in another thread.
        self._worker = ThreadPoolExecutor(1) if getattr(batches, "made_apart", False) else None
        self._ahead: tuple[int, Future[Any]] | None = None

    @property
    def length(self) -> int | None:
        """The number of turns in a round over the batches; None where it is not known in advance."""
        # A DataLoader of an IterableDataset has a method for its length, which raises TypeError too.
        try:
            # Rounded up, so that every batch comes once; the last turn may begin the next round.
            return ceil(len(self._batches) / self._world.size)  # type: ignore[arg-type]
        except TypeError:
            return None

    def close(self) -> None:
        """End the thread that makes batches."""
        if self._worker is not None:
            self._worker.shutdown()

    def first(self, turns: int) -> list[Any]:
        """The batches of the first turns, which the run will take again."""
        self._first = [self[turn] for turn in range(turns)]
        return self._first

    def __getitem__(self, turn: int) -> Any:
        """The batch of this process in a turn. Turns must rise if the batches are an iterable that is no sequence."""
        if turn < len(self._first):
            return self._first[turn]
        if self._worker is None:
            return self._batch(turn)
        number, future = self._ahead or (turn, self._worker.submit(self._batch, turn))
        batch = future.result() if number == turn else self._batch(turn)
        self._ahead = turn + 1, self._worker.submit(self._batch, turn + 1)
        return batch

    def _batch(self, turn: int) -> Any:
        number = turn * self._world.size + self._world.rank
        if isinstance(self._batches, Sequence):
            if not self._batches:
                raise _no_batches()
            return self._batches[number % len(self._batches)]
        if callable(self._batches):
            batch = self._batches(number)
            pinned = self._worker is not None and self._device.type == "cuda"
            return {name: tensor.pin_memory() for name, tensor in batch.items()} if pinned else batch
        assert number >= self._next, "an iterable cannot go back"
        if self._stream is None:
            self._stream = self._rounds()
        batch = next(islice(self._stream, number - self._next, None))
        self._next = number + 1
        return batch

    def _rounds(self) -> Iterator[Any]:
        assert isinstance(self._batches, Iterable)
        for _ in count():
            empty = True
            for batch in self._batches:
                empty = False
                yield batch
            # A generator is exhausted after its first round: iterating it again would loop for ever.
            if empty:
                raise _no_batches()


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
