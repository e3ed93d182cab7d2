"""Work in plain threads: the order of the names, and the first error in it."""

import os
import threading

import pytest

from loralens import FormatError
from loralens.core.threads import in_order, in_threads, processor_count

NAMES = [str(i) for i in range(40)]


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_results_come_in_the_order_of_the_names(count):
    found = in_threads(lambda name: int(name) ** 2, NAMES, count)
    assert list(found.items()) == [(name, int(name) ** 2) for name in NAMES]


@pytest.mark.parametrize("count", [1, 3])
def test_the_first_error_in_order_is_raised(count):
    def work(name: str) -> str:
        if int(name) >= 20:
            raise FormatError(f"{name} is broken", fix="correct it")
        return name

    with pytest.raises(FormatError, match="20 is broken"):
        in_threads(work, NAMES, count)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs the affinity of Linux")
def test_only_processors_that_the_process_may_use_are_counted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert processor_count() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert processor_count() == 64


@pytest.mark.parametrize("count", [1, 2, 7, 50])
def test_calls_in_order_yield_their_results_in_order(count):
    assert list(in_order([lambda i=i: i**2 for i in range(40)], count)) == [i**2 for i in range(40)]


@pytest.mark.parametrize("count", [1, 3])
def test_calls_in_order_raise_the_first_error_after_the_results_before_it(count):
    def work(i: int) -> int:
        if i >= 20:
            raise FormatError(f"{i} is broken", fix="correct it")
        return i

    results = in_order([lambda i=i: work(i) for i in range(40)], count)
    assert [next(results) for _ in range(20)] == list(range(20))
    with pytest.raises(FormatError, match="20 is broken"):
        next(results)


def test_calls_in_order_are_not_made_far_ahead_nor_after_their_end():
    made: list[int] = []
    others = threading.active_count()
    results = in_order([lambda i=i: made.append(i) for i in range(200)], 2)
    for _ in range(10):
        next(results)
    results.close()
    assert len(made) <= 10 + 4
    assert threading.active_count() == others
