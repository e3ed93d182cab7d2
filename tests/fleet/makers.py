"""Adapters for tests of fleets: random pairs on a few layers, and the folders that hold them."""

from pathlib import Path
from typing import Any

import numpy as np

import loralens
from loralens.core import Scaling
from tests.draws import draw_factors

LAYERS = tuple(f"model.layers.{block}.self_attn.{kind}" for block in (0, 1) for kind in ("q_proj", "v_proj"))


def random_adapter(
    seed: int, *, rank: int = 4, out: int = 24, in_: int = 32, layers: tuple[str, ...] = LAYERS, scale: float = 2.0
) -> loralens.Adapter:
    """An adapter whose factors are standard normal numbers in float32."""
    rng = np.random.default_rng(seed)
    scaling = Scaling("alpha/r", scale * rank, rank, "adapter_config.json")
    modules = {
        name: loralens.LowRank(*draw_factors(rng, out, in_, rank, "f4"), scale, scaling=scaling) for name in layers
    }
    return loralens.Adapter(modules=modules, base_model="tiny/base")


def save(folder: Path, adapter: loralens.Adapter, **options: Any) -> Path:
    """Write an adapter, and return its path."""
    loralens.save(adapter, folder, **options)
    return folder


def save_many(root: Path, count: int, **options: Any) -> list[Path]:
    """``count`` different adapters in folders of their own."""
    return [save(root / f"a{i:03d}", random_adapter(i, **options)) for i in range(count)]


def indexed(root: Path, home: Path | None = None) -> loralens.Fleet:
    """The fleet of a folder, with an index of it in ``home`` or in the folder itself."""
    fleet = loralens.Fleet.open(home or root)
    fleet.update(root)
    return fleet
