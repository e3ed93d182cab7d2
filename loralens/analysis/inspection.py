"""What is in an adapter: every module, every other tensor, and what is wrong with them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.carried import NORMS
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import select, some
from loralens.core.structured import Kronecker, Update

BLOCK = 1 << 20  # values looked at at a time: they stay in the cache of a core


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """An adapter as found.

    Attributes
    ----------
    adapter : Adapter
    modules : dict of str to Update
        Those asked for, in natural order.
    zero : list of str
        Modules whose ΔW is 0, because B or A is, or the whole matrix where there is no pair.
    extra : dict of str to Extra
        Every tensor that is not half of a pair.
    findings : list of Finding
        What the reader noticed and what the numbers show.
    """

    adapter: Adapter
    modules: dict[str, Update]
    zero: list[str]
    extra: dict[str, Extra]
    findings: list[Finding]

    @property
    def parameters(self) -> int:
        """Numbers stored in pairs."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def nbytes(self) -> int:
        """Bytes stored in pairs."""
        return sum(module.nbytes for module in self.modules.values())


def inspect_adapter(adapter: Adapter, *, modules: Sequence[str] = ()) -> Inspection:
    """Everything in an adapter, its numbers read once to find zeros, NaN and Inf.

    Parameters
    ----------
    adapter : Adapter
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.

    Raises
    ------
    OptionError
        A glob that matches nothing.
    """
    chosen = {name: adapter[name] for name in select(adapter, modules)}
    zero, spoilt = [], []
    for name, module in chosen.items():
        numbers = _numbers(module)
        if not all(_plain(array).any() for array in numbers):
            zero.append(name)
        if any(map(broken, numbers)):
            spoilt.append(name)
    spoilt += [key for key, extra in adapter.extra.items() if broken(extra.tensor.read())]
    findings = [*adapter.findings, *_zero(zero, len(chosen)), *_spoilt(spoilt)]
    return Inspection(
        adapter, chosen, zero, {key: extra for key, extra in adapter.extra.items() if extra.role not in NORMS}, findings
    )


def broken(array: Array) -> int:
    """How many values of an array of any dtype are NaN or Inf."""
    flat = array.ravel("K")
    parts = (_plain(flat[i : i + BLOCK]) for i in range(0, flat.size, BLOCK))
    return int(sum(part.size - np.count_nonzero(np.isfinite(part)) for part in parts))


def _numbers(module: Update) -> list[Array]:
    """Arrays of which one is 0 where ΔW is, and not finite where ΔW is not: B and A, or what stands in their place."""
    if isinstance(module, LowRank):
        return [module.B, module.A]
    form = module.form
    with np.errstate(over="ignore", invalid="ignore"):
        return [form.first.dense(), form.second.dense()] if isinstance(form, Kronecker) else [form.dense()]


def _plain(array: Array) -> Array:
    """The same values in a dtype that NumPy itself knows: narrow floats as float32."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array


def _zero(names: list[str], count: int) -> list[Finding]:
    if not names:
        return []
    return [
        Finding(
            "warning",
            "zero-update",
            f"{len(names)} of {count} modules do nothing, their B or A is 0: {some(names)}",
            "they were never trained: check the training code, or drop them",
        )
    ]


def _spoilt(names: list[str]) -> list[Finding]:
    if not names:
        return []
    return [
        Finding(
            "error",
            "non-finite",
            f"{len(names)} hold NaN or Inf: {some(names)}",
            "training diverged: go back to an earlier checkpoint",
        )
    ]
