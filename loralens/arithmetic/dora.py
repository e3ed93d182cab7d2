"""DoRA among adapters: sums of what they change are exact, and DoRA again.

DoRA has W' = diag(g)(W + L) with L = scale·B·A and, for every row, g = m/‖W + L‖. So what it adds to W is a pair and a
stretch of the rows of W,

    ΔW = diag(g) L + diag(g − 1) W,

of full rank; and sums of such changes have the same form, Σ c ΔW = K + diag(h) W with K = Σ c diag(g) L, of rank Σ r,
and h = Σ c (g − 1). That is what a DoRA adapter adds:

    W + K + diag(h) W = diag(1 + h)(W + L'),    L' = diag(1/(1 + h)) K,    m' = (1 + h)‖W + L'‖.

Nothing is lost but the rounding of the factors and of m', which is made for the rounded factors. Where ranks are cut, K
is cut, optimally, and the stretch stays.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import final

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.attached import PEFT_PREFIX
from loralens.core.carried import NORMS, magnitudes
from loralens.core.joint import Lift
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.core.weights import Weight
from loralens.errors import MismatchError, ShapeError, place
from loralens.linalg.factor import Floats

Weights = Mapping[str, Weight]
LEAST = 2.0**-20  # of |1 + h|: below it the base weight is all but gone from a row, and no B' would make up for it


def filled(adapter: Adapter, weights: Weights) -> Adapter:
    """The adapter with the magnitudes that its file lacks: the lengths of the base weights, which stood for them."""
    extra = dict(adapter.extra)
    for key, entry in adapter.extra.items():
        if entry.role in NORMS:
            kernel, by_input = adapter[entry.module].layout.kernel, entry.role == "norms_in"
            m = weights[entry.module].lengths(by_input=by_input).astype(np.float32)
            shape = (1, m.size, *(1 for _ in kernel)) if kernel else m.shape
            extra[key] = Extra(
                "magnitude_in" if by_input else "magnitude", entry.module, LazyArray.of(m.reshape(shape))
            )
    return replace(adapter, extra=extra)


def apart(adapter: Adapter, weights: Weights, *, threads: int = 1) -> tuple[Adapter, dict[str, Floats]]:
    """The adapter of the pairs diag(g) L, without magnitudes, and g − 1, shape (out,), of every DoRA module.

    Parameters
    ----------
    adapter : Adapter
    weights : mapping of str to Weight
        The base weight of every module that has a magnitude.

    Raises
    ------
    MismatchError
        A magnitude by input; a module that is no pair, or whose base weight is not there.
    ShapeError
        Not one number for each output.
    """
    keys_by_module = magnitudes(adapter)
    stretches = in_threads(
        lambda name: _stretch(adapter, name, keys_by_module[name], weights.get(name)), list(keys_by_module), threads
    )
    keys = {*keys_by_module.values()}
    extra = {key: one for key, one in adapter.extra.items() if key not in keys}
    modules = {
        name: _scaled(one, stretches[name] + 1) if name in keys_by_module else one for name, one in adapter.items()
    }
    return replace(adapter, modules=modules, extra=extra), stretches


def _stretch(adapter: Adapter, name: str, key: str, weight: Weight | None) -> Floats:
    """The stretch g − 1 of a module whose magnitude is at ``key``."""
    module, extra = adapter[name], adapter.extra[key]
    with place(key):
        if extra.role not in ("magnitude", "norms"):
            what = "is a magnitude by input: it stretches the columns of W"
            raise MismatchError(what, fix="merge it into the base with loralens merge")
        if extra.role == "magnitude" and extra.tensor.size != module.shape[0]:
            raise ShapeError(f"{extra.tensor.shape} is not one number for each output", fix="save the adapter again")
        if weight is None:
            raise MismatchError("its base weight is not there", fix="give the base that it was trained on")
        m = weight.lengths() if extra.role in NORMS else extra.tensor.read().astype(np.float64).reshape(-1)
        lengths = np.sqrt(squares(weight, module))
        return np.asarray(np.divide(m, lengths, out=np.ones_like(m), where=lengths > 0) - 1)  # zeros stay zeros


def _scaled(module: Update, rows: Floats) -> LowRank:
    """diag(rows) ΔW."""
    B, A = module.factors
    scaled = B.map(lambda X: rows[:, None] * X, shape=B.shape, dtype=np.float64)
    return LowRank(scaled, A, module.scale, scaling=module.scaling, layout=module.layout)


def squares(weight: Weight, update: Update) -> Floats:
    """‖W + ΔW‖² of every row, float64, shape (out,)."""
    B, A = update.scale * update.B.astype(np.float64), update.A.astype(np.float64)
    total = np.zeros(weight.shape[0])
    for rows, columns, W in pieces(weight):
        W += B[rows] @ A[:, columns]
        total[rows] += np.einsum("ij,ij->i", W, W)
    return total


def pieces(weight: Weight) -> Iterator[tuple[slice, slice, Floats]]:
    """W in float64, some rows or some columns at a time, with the place of both; what is given may be written into."""
    for part, block in weight.blocks():
        if weight.transposed:
            yield slice(None), part, block.T.astype(np.float64)
        else:
            yield part, slice(None), block.astype(np.float64)


@final
@dataclass(frozen=True, slots=True)
class Stretches:
    """h of every module of a combination, and what a DoRA adapter of it needs besides.

    Attributes
    ----------
    h : mapping of str to float64 array, shape (out,)
    weights : mapping of str to Weight
    keys : mapping of str to (str, tuple of int)
        What the magnitude of a module is called in the file, and its shape there.
    """

    h: Mapping[str, Floats]
    weights: Weights
    keys: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def any(self) -> bool:
        """Whether a row of W is stretched at all; else the combination is a plain sum of pairs."""
        return any(h.any() for h in self.h.values())

    def pair(self, name: str, lift: Lift) -> Lift:
        """L' of the module, for its K.

        Raises
        ------
        MismatchError
            The combination takes the base weight away from a row.
        """
        rows = 1 + self.h[name]
        gone = int(np.count_nonzero(np.abs(rows) < LEAST))
        if gone:
            with place(name):
                raise MismatchError(
                    f"{gone} rows would keep nothing of the base weight, which no DoRA adapter can say",
                    fix="give other weights",
                )
        return lift.stretched(1 / rows)

    def magnified(self, adapter: Adapter) -> Adapter:
        """``adapter``, whose pairs are the L', with their magnitudes: DoRA. As it is where no row is stretched."""
        extra = dict(adapter.extra)
        for name, module in adapter.items() if self.any else ():
            key, shape = self.keys[name]
            compute = cache(partial(_lengths, 1 + self.h[name], self.weights[name], module, shape))
            extra[key] = Extra("magnitude", name, LazyArray(compute, shape=shape, dtype=np.float32))
        config = adapter.config
        if config is not None and adapter.format == "peft" and bool(config.get("use_dora")) != self.any:
            config = {**config, "use_dora": self.any}
        return replace(adapter, extra=extra, config=config)


def _lengths(rows: Floats, weight: Weight, module: Update, shape: tuple[int, ...]) -> Array:
    """(1 + h)‖W + L'‖, float32 whatever the factors are: its rounding is one of W."""
    return (rows * np.sqrt(squares(weight, module))).astype(np.float32).reshape(shape)


def named_keys(
    adapters: Sequence[Adapter], modules: Mapping[str, tuple[Update, Sequence[str | None]]]
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the magnitude of each module is called in a file of the first adapter's dialect, and its shape there.

    As in an adapter that has it, else as in PEFT.

    Parameters
    ----------
    adapters : sequence of Adapter
    modules : mapping of str to (LowRank, sequence of str or None)
        Name in the combination → an update of it, and what each adapter calls it.

    Raises
    ------
    MismatchError
        Another dialect than PEFT's, and no file that says it.
    """
    first = adapters[0].format
    keys_by_adapter = [magnitudes(one) if one.format == first else {} for one in adapters]
    keys = {}
    for name, (update, own) in modules.items():
        existing = [
            (magnitude_keys[name], one.extra[magnitude_keys[name]].tensor.shape)
            for one, magnitude_keys, called in zip(adapters, keys_by_adapter, own, strict=True)
            if called == name and name in magnitude_keys and one.extra[magnitude_keys[name]].role not in NORMS
        ]
        if not existing and first != "peft":
            raise MismatchError(
                f"{name} would have a magnitude, and no file says what {first} calls it",
                fix="convert the adapters to PEFT first: loralens convert --to peft",
            )
        kernel = update.layout.kernel
        new = (1, update.shape[0], *(1 for _ in kernel)) if kernel else (update.shape[0],)
        key = f"{PEFT_PREFIX}{name}.lora_magnitude_vector"
        keys[name] = existing[0] if existing else (key, new)
    return keys
