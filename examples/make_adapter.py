"""Make a small PEFT adapter to try loralens on: a made-up 4-block model whose modules differ on purpose.

    python examples/make_adapter.py out/demo

Query updates use few directions, value updates many, and one module was never trained (B = 0).
"""

import sys
from pathlib import Path

import numpy as np

import loralens
from loralens.core.lazy import Array
from loralens.core.lowrank import Scaling

WIDTH, RANK, BLOCKS = 256, 8, 4
DECAY = {"q_proj": 0.45, "k_proj": 0.6, "v_proj": 0.9, "o_proj": 0.75}  # ratio of successive singular values


def update(rng: np.random.Generator, decay: float) -> tuple[Array, Array]:
    """B (out, r) and A (r, in) whose product has a geometric spectrum."""
    U = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0]
    V = np.linalg.qr(rng.standard_normal((WIDTH, RANK)))[0]
    root = np.sqrt(decay ** np.arange(RANK))
    return (U * root).astype(np.float32), (V * root).T.astype(np.float32)


def main(folder: Path) -> None:
    """Write the adapter into ``folder``."""
    rng = np.random.default_rng(0)
    scaling = Scaling("alpha/r", 16, RANK, "adapter_config.json")
    modules = {}
    for block in range(BLOCKS):
        for kind, decay in DECAY.items():
            B, A = update(rng, decay)
            untrained = (block, kind) == (2, "o_proj")
            name = f"model.layers.{block}.self_attn.{kind}"
            modules[name] = loralens.LowRank(0 * B if untrained else B, A, scaling.value, scaling=scaling)
    adapter = loralens.Adapter(modules=modules, base_model="examples/made-up-model")
    loralens.save(adapter, folder, overwrite=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo"))
