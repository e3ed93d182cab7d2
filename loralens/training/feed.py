"""The batches of a run by number, so that a run can start at any step and processes can share them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from loralens.errors import OptionError

Batches = Iterable[Any] | Callable[[int], Any]


@final
class Feed:
    """Batch number 0, 1, 2 … of a run.

    Parameters
    ----------
    batches : sequence, iterable or callable
        A sequence is gone through again and again, in its order. An iterable too; it is begun anew for every round, so
        what it yields may differ, and a run that goes on passes over what it has seen. A callable is asked for every
        number once and is the way to shuffle: see `shuffle_order`.

    Raises
    ------
    OptionError
        It is none of these.
    """

    def __init__(self, batches: Batches) -> None:
        if not (isinstance(batches, Iterable) or callable(batches)):
            what = f"batches {batches!r} are none"
            raise OptionError(what, fix="give a list of batches, an iterable, or a function of the batch's number")
        self._batches = batches
        self._stream: Iterator[Any] | None = None
        self._next = 0

    @property
    def length(self) -> int | None:
        """How many batches one round has; None where that is not known before."""
        return len(self._batches) if isinstance(self._batches, Sequence) else None

    def __getitem__(self, number: int) -> Any:
        """The batch of a number; from an iterable, numbers must rise."""
        if isinstance(self._batches, Sequence):
            if not self._batches:
                raise _no_batches()
            return self._batches[number % len(self._batches)]
        if callable(self._batches):
            return self._batches(number)
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
        while True:
            empty = True
            for batch in self._batches:
                empty = False
                yield batch
            if empty:
                raise _no_batches()


def _no_batches() -> OptionError:
    return OptionError("there are no more batches", fix="give a list of batches, or an iterable that can begin again")


def shuffle_order(count: int, *, size: int, seed: int) -> Callable[[int], list[int]]:
    """Batch number → which of ``count`` examples it holds: every example once in a round, each round in a new order.

    The numbers of a round are a permutation that depends on seed and round alone; batches run across the border of two
    rounds, so all have ``size`` examples.

    Raises
    ------
    OptionError
        There are no examples.
    """
    if count < 1:
        raise OptionError("there are no examples", fix="give at least one")
    orders: dict[int, Any] = {}  # the last two rounds: a batch may lie in both

    def order(round_: int) -> Any:
        if round_ not in orders:
            generator = np.random.Generator(np.random.Philox(key=[seed % 2**64, round_]))
            orders[round_] = generator.permutation(count)
            # A run asks for rising numbers, so older rounds are never needed again.
            for old in [known for known in orders if abs(known - round_) > 1]:
                del orders[old]
        return orders[round_]

    def batch(number: int) -> list[int]:
        places = range(number * size, (number + 1) * size)
        return [int(order(place // count)[place % count]) for place in places]

    return batch


def move_batch(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device; mappings, tuples (named ones too) and lists are gone into."""
    if isinstance(batch, Tensor):
        # non_blocking lets a copy from pinned memory run beside the computation; otherwise it changes nothing.
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {name: move_batch(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        values = [move_batch(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def size_of(batch: Any) -> int:
    """How much a batch holds: tokens where it has an attention mask, else examples; 0 where neither is known."""
    if isinstance(batch, Mapping) and isinstance(mask := batch.get("attention_mask"), Tensor):
        return int(mask.sum())
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else (batch,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.ndim), 0)
