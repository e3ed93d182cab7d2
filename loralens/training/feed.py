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
    """The batches 0, 1, 2 … of a run.

    Parameters
    ----------
    batches : sequence, iterable or callable
        A sequence is repeated in its order. Any other iterable is iterated anew for every round, so a round may differ
        from the one before; a run that is resumed skips the batches that it has seen. A callable is asked once for
        every number, which is how batches are shuffled: see `shuffle_order`.

    Raises
    ------
    OptionError
        The argument is none of these.
    """

    def __init__(self, batches: Batches) -> None:
        if not (isinstance(batches, Iterable) or callable(batches)):
            what = f"batches {batches!r} is neither iterable nor callable"
            raise OptionError(what, fix="give a list of batches, an iterable, or a function of the batch's number")
        self._batches = batches
        self._stream: Iterator[Any] | None = None
        self._next = 0

    @property
    def length(self) -> int | None:
        """The number of batches in a round; None where it is not known in advance."""
        return len(self._batches) if isinstance(self._batches, Sequence) else None

    def __getitem__(self, number: int) -> Any:
        """The batch of a number. Numbers must rise if the batches are an iterable that is no sequence."""
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
            # A generator is exhausted after its first round: iterating it again would loop for ever.
            if empty:
                raise _no_batches()


def _no_batches() -> OptionError:
    return OptionError("there are no more batches", fix="give a list of batches, or an iterable that can begin again")


def shuffle_order(count: int, *, size: int, seed: int) -> Callable[[int], list[int]]:
    """A function from the number of a batch to the examples in it: each of ``count`` examples once in every round.

    The order of a round is a permutation that depends only on the seed and on the number of the round. All batches have
    ``size`` examples, since a batch may contain the end of one round and the start of the next.

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
