"""A fingerprint is that of the numbers: not of names' dialects, dtypes, order or metadata."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import fingerprint
from loralens.core import Dense, Extra, LazyArray, Structured

rng = np.random.default_rng(0)
B, A = (rng.standard_normal((6, 2)).astype(ml_dtypes.bfloat16), rng.standard_normal((2, 4)).astype(ml_dtypes.bfloat16))


def of(B: np.ndarray, A: np.ndarray, scale: float = 1.0, name: str = "layers.0.q", **more: Any) -> loralens.Adapter:
    return loralens.Adapter(modules={name: loralens.LowRank(B, A, scale)}, **more)


def adapter(name: str = "layers.0.q", scale: float = 2.0, **more: Any) -> loralens.Adapter:
    return of(B, A, scale, name, **more)


def test_it_is_32_digits_and_always_the_same() -> None:
    one = of(np.ones((1, 1), np.float32), np.ones((1, 1), np.float32), name="q")
    assert fingerprint(one) == "865e622db6fefb4e5b2159c43358453c"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_wider_dtype_with_the_same_values_is_the_same(dtype: type) -> None:
    wide = of(B.astype(dtype), A.astype(dtype), 2.0)
    assert fingerprint(wide) == fingerprint(adapter())


def test_values_that_float32_cannot_hold_count() -> None:
    big, bigger = (of(np.full((2, 1), x), np.ones((1, 2))) for x in (1e300, 2e300))
    near = of(np.full((2, 1), 1 + 2.0**-40), np.ones((1, 2)))
    ones = of(np.ones((2, 1)), np.ones((1, 2)))
    assert len({fingerprint(one) for one in (big, bigger, near, ones)}) == 4


def test_names_of_two_dialects_order_strides_and_metadata_do_not_count() -> None:
    said = adapter(metadata={"a": "b"}, base_model="somewhere", format="kohya")
    assert fingerprint(said) == fingerprint(adapter())
    assert fingerprint(adapter("lora_unet_layers_0_q")) == fingerprint(adapter("layers.0.q"))
    first, second = loralens.LowRank(B, A), loralens.LowRank(B, A, 3.0)
    pipeline = loralens.Adapter(modules={"unet.b": first, "text_encoder.c": second})
    assert fingerprint(pipeline) == fingerprint(loralens.Adapter(modules={"b": first, "c": second}))
    turned = loralens.LowRank(np.asfortranarray(B), np.asfortranarray(A), 2.0)
    assert fingerprint(loralens.Adapter(modules={"layers.0.q": turned})) == fingerprint(adapter())


def test_minus_zero_is_zero() -> None:
    plus, minus = (of(np.array([[x]]), np.ones((1, 1))) for x in (0.0, -0.0))
    assert fingerprint(plus) == fingerprint(minus)


@pytest.mark.parametrize("form", [lambda x: x, np.asfortranarray, lambda x: x[::-1], lambda x: x.astype(">f2")])
def test_float16_is_hashed_as_the_float32_numbers_that_it_holds(form: Callable[[np.ndarray], np.ndarray]) -> None:
    # Every number of 16 bits, with both zeros, infinities and all kinds of NaN.
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(512, 128)
    narrow, row = form(every), np.ones((128, 1), np.float16)
    with np.errstate(invalid="ignore"):
        two = (of(B, row) for B in (narrow, np.ascontiguousarray(narrow).astype(np.float32)))
        assert len({fingerprint(one) for one in two}) == 1


def test_what_changes_the_update_changes_the_fingerprint() -> None:
    other = B.copy()
    other[0, 0] += 1
    bias = {"k": Extra("bias", "layers.0.q", LazyArray.of(np.ones(6)))}
    changed = [
        adapter(),
        adapter(scale=-2.0),
        adapter("layers.1.q"),
        of(other, A, 2.0),
        of(B[:, :1], A[:1], 2.0),
        of(B.reshape(3, 4), np.vstack([A, A]), 2.0),
        loralens.Adapter(modules={"layers.0.q": Structured(Dense(LazyArray.of(np.eye(3))))}),
        adapter(extra=bias),
        loralens.Adapter(modules={}),
    ]
    assert len({fingerprint(one) for one in changed}) == len(changed)
