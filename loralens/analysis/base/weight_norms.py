"""Norms of base weights, and the progress reports of passes over them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.core.threads import Step
from loralens.core.weights import Weight
from loralens.errors import place
from loralens.linalg.device import Device
from loralens.linalg.projection import project
from loralens.linalg.randomized import STEPS, copy_dtype, leading_svd


@final
@dataclass(frozen=True, slots=True)
class WeightNorms:
    """Norms of one weight W.

    Attributes
    ----------
    frobenius : float
        ‖W‖_F.
    spectral : float
        σ₁(W); the randomised method never gives more, except for rounding.
    spectral_error : float
        W has a singular value within this distance of ``spectral``; 0 if the SVD was dense.
    """

    frobenius: float
    spectral: float
    spectral_error: float


def weight_norms(
    weights: Mapping[str, Weight], *, device: str | Device = "cpu", step: Step | None = None
) -> dict[str, WeightNorms]:
    """‖W‖_F and σ₁(W) of the base weight of every module.

    Parameters
    ----------
    weights : mapping of str to Weight
        Read one at a time, with a copy in memory: float64 if the shorter side is at most 512, else float32, or bfloat16
        if the weight is stored in it and the kernel was compiled.
    device, step
        As in `loralens.analysis.base.amplification.measure_amplification`.

    Raises
    ------
    FormatError
        A weight holds NaN or Inf.
    """
    on_device = Device.of(device)
    new_matrix = on_device.memory()

    def measure(weight: Weight) -> WeightNorms:
        with report_progress(step, weight_steps([weight], top=True)) as tell:
            shape = weight.shape[::-1] if weight.transposed else weight.shape
            # The pass projects onto no directions and has no sketch: it sums the squares and copies W for the SVD.
            nothing = [np.zeros((n, 0)) for n in (*shape, shape[1])]
            W = new_matrix(shape, copy_dtype(shape, 1, stored=weight.stored.dtype, device=on_device))
            projection = project(weight.blocks(on_device.block), *nothing, device=on_device, out=W, step=tell)
            # A fixed seed: the norm of a weight does not depend on the run.
            led = leading_svd(W, 1, rng=np.random.default_rng(0), device=on_device, step=tell)
            return WeightNorms(sqrt(projection.squares), float(led.s[0]), float(led.error[0]))

    norms = {}
    for name, weight in weights.items():
        with place(name):
            norms[name] = measure(weight)
    return norms


def weight_steps(weights: Iterable[Weight], *, top: bool) -> int:
    """The total passed to ``step``: the entries of the weights, with ``top`` once more for every Krylov step."""
    return sum(weight.stored.size for weight in weights) * (1 + STEPS * top)


@contextmanager
def report_progress(step: Step | None, size: int) -> Iterator[Step]:
    """Yield a progress function for a task of this size; at the end the remainder is reported to ``step``."""
    done = 0

    def tell(count: int) -> None:
        nonlocal done
        done += count
        if step:
            step(count)

    yield tell
    # A dense SVD takes no Krylov steps, and W = 0 no SVD: the total is nevertheless reached.
    tell(size - done)
