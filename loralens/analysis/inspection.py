"""The contents of an adapter: every module, every other tensor, and findings about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.names import some
from loralens.core.selection import select
from loralens.core.structured import Kronecker, Update
from loralens.core.together import NORMS

BLOCK = 1 << 20  # values that are tested at a time: 4 MiB in float32, so that they stay in the cache of a core


@final
@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of an adapter.

    Attributes
    ----------
    modules : dict of str to Update
        The chosen modules, in natural order.
    zero : list of str
        Modules with ΔW = 0. In a pair, B or A is then 0; in a module without a pair, a factor of the Kronecker product
        or the whole matrix.
    extra : dict of str to Extra
        Every tensor that is not a factor of a pair.
    findings : list of Finding
        The findings of the reader, and those about the numbers.
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
    """List everything in an adapter; its numbers are read once to find zeros, NaN and Inf.

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
        if any(map(count_non_finite, numbers)):
            spoilt.append(name)
    spoilt += [key for key, extra in adapter.extra.items() if count_non_finite(extra.tensor.read())]
    findings = [*adapter.findings]
    if zero:
        text = f"{len(zero)} of {len(chosen)} modules do nothing, because their B or A is 0: {some(zero)}"
        fix = "they were never trained: check the training code, or drop them"
        findings.append(Finding("warning", "zero-update", text, fix))
    if spoilt:
        text = f"{len(spoilt)} hold NaN or Inf: {some(spoilt)}"
        findings.append(Finding("error", "non-finite", text, "training diverged: go back to an earlier checkpoint"))
    # These roles mark magnitudes that the file does not have, so such entries are not part of its contents.
    extra = {key: extra for key, extra in adapter.extra.items() if extra.role not in NORMS}
    return Inspection(adapter, chosen, zero, extra, findings)


def count_non_finite(array: Array) -> int:
    """The number of NaN and Inf in an array of any dtype."""
    # In the order of the memory ("K"), because a flat copy of a transposed weight would double its memory.
    flat = array.ravel("K")
    parts = (_plain(flat[i : i + BLOCK]) for i in range(0, flat.size, BLOCK))
    return int(sum(part.size - np.count_nonzero(np.isfinite(part)) for part in parts))


def holds_non_finite(module: Update) -> bool:
    """Whether a factor of an update, or an array in its place, holds NaN or Inf."""
    return any(map(count_non_finite, _numbers(module)))


def _numbers(module: Update) -> list[Array]:
    """B and A, or the arrays in their place.

    If ΔW is 0, one of these arrays is 0. If ΔW holds NaN or Inf, so does one of them.
    """
    if isinstance(module, LowRank):
        return [module.B, module.A]
    form = module.form
    # Entries of ΔW may overflow. This function looks for that, so a warning of NumPy is not needed.
    with np.errstate(over="ignore", invalid="ignore"):
        return [form.first.dense(), form.second.dense()] if isinstance(form, Kronecker) else [form.dense()]


def _plain(array: Array) -> Array:
    """The same values in a dtype of NumPy: narrow floats, such as bfloat16, become float32."""
    return array.astype(np.float32) if array.dtype.itemsize < 4 else array
