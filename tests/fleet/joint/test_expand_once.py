"""Both factors of an expanded module are computed once, however many threads read them."""

from threading import Thread
from time import sleep

import numpy as np

from loralens.core.few_bits.shared_bases import lazy_pair


def test_two_threads_that_read_both_factors_compute_them_once() -> None:
    calls = []

    def compute() -> tuple[np.ndarray, np.ndarray]:
        calls.append(1)
        sleep(0.05)
        return np.full((4, 2), 3.0), np.full((2, 5), 7.0)

    B, A = lazy_pair(compute, (4, 5), 2, np.float32)
    threads = [Thread(target=factor.read) for factor in (B, A)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
