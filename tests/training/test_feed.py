"""Feeds: which batch has which number, and which examples are in it."""

from collections.abc import Iterator

import pytest

from loralens import OptionError
from loralens.training.feed import Feed, shuffle_order, size_of

torch = pytest.importorskip("torch")


class Rounds:
    """An iterable that yields something else in every round."""

    def __init__(self) -> None:
        self.begun = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.begun += 1
        yield from ((self.begun, i) for i in range(3))


def test_an_iterable_is_begun_anew_for_every_round_and_passed_over() -> None:
    feed = Feed(Rounds())
    assert [feed[0], feed[1], feed[4], feed[6]] == [(1, 0), (1, 1), (2, 1), (3, 0)]


@pytest.mark.parametrize("nothing", [[], iter(()), Feed])
def test_an_empty_feed_is_refused(nothing: object) -> None:
    empty = Feed(()) if nothing is Feed else Feed(nothing)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="no more batches"):
        empty[0]


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 8)])
def test_every_example_comes_once_a_round_and_batches_run_over_the_border(count: int, size: int) -> None:
    order = shuffle_order(count, size=size, seed=3)
    rounds = 6
    numbers = [i for batch in range(-(-rounds * count // size)) for i in order(batch)]
    for start in range(0, rounds * count, count):
        assert sorted(numbers[start : start + count]) == list(range(count))
    assert all(len(order(batch)) == size for batch in range(9))
    if count > 4:
        assert numbers[:count] != numbers[count : 2 * count]


def test_the_order_depends_on_seed_and_number_alone() -> None:
    order, again = shuffle_order(50, size=8, seed=1), shuffle_order(50, size=8, seed=1)
    assert [order(number) for number in range(30)] == [again(number) for number in reversed(range(30))][::-1]
    assert order(0) != shuffle_order(50, size=8, seed=2)(0)


def test_processes_and_parts_of_a_step_share_one_order() -> None:
    whole, part = shuffle_order(50, size=8, seed=1), shuffle_order(50, size=2, seed=1)
    assert [whole(step) for step in range(9)] == [
        [i for number in range(4 * step, 4 * step + 4) for i in part(number)] for step in range(9)
    ]


def test_the_size_of_a_batch_is_its_tokens_or_its_examples() -> None:
    assert size_of({"input_ids": torch.zeros(2, 3), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}) == 3
    assert size_of((torch.zeros(5, 3), torch.zeros(5))) == 5
    assert size_of([torch.tensor(1.0), torch.zeros(4)]) == 4
    assert size_of(torch.zeros(6, 1)) == 6
    assert size_of({"a": "text"}) == size_of(None) == 0
