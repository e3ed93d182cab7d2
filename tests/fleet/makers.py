"""Adapters for tests of fleets: random pairs on a few layers, and the folders that hold them."""

from pathlib import Path
from typing import Any

import numpy as np

import loralens
from loralens.core import Scaling

LAYERS = tuple(f"model.layers.{block}.self_attn.{kind}" for block in (0, 1) for kind in ("q_proj", "v_proj"))


def random_adapter(
    seed: int, *, rank: int = 4, out: int = 24, in_: int = 32, layers: tuple[str, ...] = LAYERS, scale: float = 2.0
) -> loralens.Adapter:
    """An adapter whose factors are standard normal numbers in float32."""
    rng = np.random.default_rng(seed)
    scaling = Scaling("alpha/r", scale * rank, rank, "adapter_config.json")

    def pair() -> loralens.LowRank:
        B = rng.standard_normal((out, rank)).astype(np.float32)
        A = rng.standard_normal((rank, in_)).astype(np.float32)
        return loralens.LowRank(B, A, scale, scaling=scaling)

    return loralens.Adapter(modules={name: pair() for name in layers}, base_model="tiny/base")


def save(folder: Path, adapter: loralens.Adapter, **options: Any) -> Path:
    """Write an adapter, and return its path."""
    loralens.save(adapter, folder, **options)
    return folder


def save_many(root: Path, count: int, **options: Any) -> list[Path]:
    """``count`` different adapters in folders of their own."""
    return [save(root / f"a{i:03d}", random_adapter(i, **options)) for i in range(count)]


def dense(adapter: loralens.Adapter) -> dict[str, np.ndarray]:
    """ΔW of every module."""
    return {name: module.dense() for name, module in adapter.items()}


def cosine(first: loralens.Adapter, second: loralens.Adapter) -> float:
    """The cosine of two updates with the same names, from the dense matrices."""
    a, b = dense(first), dense(second)
    inner = sum(float(np.vdot(a[name], b[name])) for name in a.keys() & b.keys())
    return inner / float(np.sqrt(sum(np.vdot(x, x) for x in a.values()) * sum(np.vdot(x, x) for x in b.values())))
