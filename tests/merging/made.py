"""Small bases with an adapter for each kind of weight, and what merging them has to give, worked out densely."""

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import loralens
from loralens import Adapter
from loralens.core import Dense, Extra, Hadamard, Kronecker, Layout, LazyArray, Structured
from tests.reference import dora_weight

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)


@dataclass
class Case:
    """A base by key, adapters with their weights, and the merged tensors in float64 by key."""

    base: dict[str, Any]
    adapters: list[tuple[Adapter, float]]
    expected: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def lazy(self):
        return {key: streamed(array) for key, array in self.base.items()}


def streamed(array):
    return LazyArray(lambda: array, shape=array.shape, dtype=array.dtype, rows=lambda start, stop: array[start:stop])


def wide(array):
    return array.astype(np.float64)


class Maker:
    """Random tensors of one dtype and size of update, from one seed."""

    def __init__(self, seed, dtype, size=1.0):
        self.rng, self.dtype, self.size = np.random.default_rng(seed), np.dtype(dtype), size

    def weight(self, *shape):
        return self.rng.standard_normal(shape).astype(self.dtype)

    def floats(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def pair(self, out, in_, rank=2, scale=0.5, **layout):
        B = self.size * self.floats(out, rank)
        return loralens.LowRank(B, self.floats(rank, in_), scale, layout=Layout(**layout))

    def full(self, *shape):
        return Dense(LazyArray.of(self.floats(*shape)))


def adapter(modules, **extra):
    named = {
        key: Extra(role, module, LazyArray.of(array), parameter)
        for key, (role, module, array, parameter) in extra.items()
    }
    return Adapter(modules=modules, extra=named)


def linear(make):
    W, one = make.weight(6, 10), make.pair(6, 10)
    base = {"a.weight": W, "a.bias": make.weight(6), "other": make.weight(3)}
    return Case(base, [(adapter({"a": one}), 1.5)], {"a.weight": wide(W) + 1.5 * one.dense()})


def conv1d(make):
    W, one = make.weight(10, 6), make.pair(6, 10)
    return Case({"a.weight": W}, [(adapter({"a": one}), 1.0)], {"a.weight": wide(W) + one.dense().T}, {"conv1d": True})


def convolution(make):
    W, one = make.weight(4, 3, 2, 2), make.pair(4, 12, kind="conv", kernel=(2, 2))
    return Case({"c.weight": W}, [(adapter({"c": one}), 1.0)], {"c.weight": wide(W) + one.dense().reshape(W.shape)})


def embedding(make):
    W, one = make.weight(9, 4), make.pair(4, 9, kind="embedding")
    return Case({"e.weight": W}, [(adapter({"e": one}), 1.0)], {"e.weight": wide(W) + one.dense().T})


def experts(make, transposed=False):
    W = make.weight(3, 4, 7)
    shape = (7, 4) if transposed else (4, 7)
    modules = {f"x.w[{e}]": make.pair(*shape, kind="experts") for e in (0, 2)}
    expected = wide(W)
    for e in (0, 2):
        dense = modules[f"x.w[{e}]"].dense()
        expected[e] += dense.T if transposed else dense
    return Case({"x.w": W}, [(adapter(modules), 1.0)], {"x.w": expected})


def experts_lying(make):
    return experts(make, transposed=True)


def structured(make):
    forms = {
        "k": Structured(Kronecker(make.full(3, 2), make.pair(2, 5)), -0.5),
        "h": Structured(Hadamard(make.pair(6, 10), make.pair(6, 10)), 0.3),
        "d": Structured(make.full(6, 10), 0.25),
    }
    base = {f"{name}.weight": make.weight(6, 10) for name in forms}
    expected = {f"{name}.weight": wide(base[f"{name}.weight"]) + one.dense() for name, one in forms.items()}
    return Case(base, [(adapter(forms), 1.0)], expected)


def several(make):
    W, one, two = make.weight(6, 10), make.pair(6, 10), make.pair(6, 10, rank=3, scale=-0.25)
    three = Structured(make.full(6, 10), 0.1)
    adapters = [(adapter({"a": one}), 0.7), (adapter({"a": two}), -1.3), (adapter({"a": three}), 2.0)]
    total = wide(W) + 0.7 * one.dense() - 1.3 * two.dense() + 2.0 * three.dense()
    return Case({"a.weight": W}, adapters, {"a.weight": total})


def extras(make):
    """A replaced bias, a new head, a replaced one, differences of a weight and of a bias, a bias on B."""
    base = {name: make.weight(*shape) for name, shape in (
        ("a.weight", (6, 10)), ("a.bias", (6,)), ("n.weight", (5,)), ("n.bias", (5,)), ("head.weight", (2, 6)),
        ("b.weight", (6, 10)), ("b.bias", (6,)),
    )}  # fmt: skip
    one, two = make.pair(6, 10), make.pair(6, 10)
    new, head, bias = make.floats(3, 6), make.floats(2, 6), make.floats(6)
    difference, on_norm, on_B = make.floats(5), make.floats(5), make.floats(6)
    extra = {
        "1": ("bias", "a", bias, "bias"),
        "2": ("saved", "new", new, "weight"),
        "3": ("saved", "head", head, "weight"),
        "4": ("diff_b", "n", difference, "bias"),
        "5": ("diff", "n", on_norm, "weight"),
        "6": ("lora_bias", "b", on_B, "bias"),
        "7": ("copy", "head", head, "weight"),
    }
    expected = {
        "a.weight": wide(base["a.weight"]) + one.dense(),
        "b.weight": wide(base["b.weight"]) + two.dense(),
        "a.bias": wide(bias.astype(make.dtype)),
        "new.weight": wide(new),
        "head.weight": wide(head.astype(make.dtype)),
        "n.bias": wide(base["n.bias"]) + difference,
        "n.weight": wide(base["n.weight"]) + on_norm,
        "b.bias": wide(base["b.bias"]) + two.scale * wide(on_B),
    }
    return Case(base, [(adapter({"a": one, "b": two}, **extra), 1.0)], expected)


def tokens(make):
    W, one, rows = make.weight(9, 4), make.pair(4, 9, kind="embedding"), make.floats(2, 4)
    made = adapter({"e": one}, t=("tokens", "e", rows, "weight"))
    made = Adapter(modules=made.modules, extra=made.extra, config={"trainable_token_indices": {"e": [7, 2]}})
    expected = wide(W) + one.dense().T
    expected[[7, 2]] = rows.astype(make.dtype).astype(np.float64)
    return Case({"e.weight": W}, [(made, 1.0)], {"e.weight": expected})


def resized(make):
    W, rows, one = make.weight(9, 4), make.floats(11, 4), make.pair(6, 10)
    base = {"a.weight": make.weight(6, 10), "e.weight": W}
    made = adapter({"a": one}, e=("embedding", "e", rows, "weight"))
    expected = {
        "a.weight": wide(base["a.weight"]) + one.dense(),
        "e.weight": wide(rows.astype(make.dtype)),
    }
    return Case(base, [(made, 1.0)], expected, {"config": {"vocab_size": 9}})


def dora(make, *, role="magnitude", lying=False, kind="linear"):
    shape = (4, 9) if kind == "embedding" else (6, 10)
    stored = shape[::-1] if lying else shape
    W = make.weight(*stored)
    W[0] = 0
    one = make.pair(*shape, kind=kind)
    one = loralens.LowRank(
        np.where(np.arange(shape[0])[:, None] == 0, np.float32(0), one.B), one.A, one.scale, layout=one.layout
    )
    axis = 0 if role == "magnitude" else 1
    lengths = np.abs(make.floats(shape[axis])) + 1
    total = wide(W.T if lying else W) + 0.8 * one.dense()
    found = dora_weight(total, lengths, axis)
    made = adapter({"a": one}, m=(role, "a", lengths, "weight"))
    options = {"conv1d": True} if lying and kind == "linear" else {}
    return Case({"a.weight": W}, [(made, 0.8)], {"a.weight": found.T if lying else found}, options)


def dora_in(make):
    return dora(make, role="magnitude_in")


def dora_lying(make):
    return dora(make, lying=True)


def dora_in_lying(make):
    return dora(make, role="magnitude_in", lying=True)


def dora_embedding(make):
    return dora(make, lying=True, kind="embedding")


def dora_convolution(make):
    W, one = make.weight(4, 3, 2, 2), make.pair(4, 12, kind="conv", kernel=(2, 2))
    lengths = np.abs(make.floats(1, 4, 1, 1)) + 1
    found = dora_weight(wide(W).reshape(4, 12) + one.dense(), lengths.ravel(), 0)
    made = adapter({"c": one}, m=("magnitude", "c", lengths, "weight"))
    return Case({"c.weight": W}, [(made, 1.0)], {"c.weight": found.reshape(W.shape)})


def dora_in_convolution(make, *, flat=False):
    """One number an input channel: the norm runs over outputs and kernel, as LyCORIS and ComfyUI have it."""
    W = make.weight(4, 3, 2, 2)
    one = make.pair(4, 12) if flat else make.pair(4, 12, kind="conv", kernel=(2, 2))
    lengths = np.abs(make.floats(1, 3, 1, 1)) + 1
    total = (wide(W).reshape(4, 12) + one.dense()).reshape(4, 3, 4)
    by_channel = dora_weight(total.transpose(1, 0, 2).reshape(3, 16), lengths.ravel(), 0)
    found = by_channel.reshape(3, 4, 4).transpose(1, 0, 2)
    made = adapter({"c": one}, m=("magnitude_in", "c", lengths, "weight"))
    return Case({"c.weight": W}, [(made, 1.0)], {"c.weight": found.reshape(W.shape)})


def dora_in_flat_kernel(make):
    """A module that LyCORIS stores with its kernel flattened, which looks linear until its base is known."""
    return dora_in_convolution(make, flat=True)


CASES = (
    linear, conv1d, convolution, embedding, experts, experts_lying, structured, several, extras, tokens, resized, dora,
    dora_in, dora_lying, dora_in_lying, dora_embedding, dora_convolution,
    dora_in_convolution, dora_in_flat_kernel,
)  # fmt: skip
