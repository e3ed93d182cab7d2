"""Adapters as training leaves them, to be made ill by the tests."""

import numpy as np

import loralens
from loralens import Diagnosis, LowRank
from loralens.analysis import examine_all, run_checks
from loralens.analysis.diagnosis import Examination
from loralens.analysis.merge_effect import Base
from loralens.core import LazyArray, Scaling
from loralens.core.lowrank import scale_of
from tests.draws import draw_basis

KINDS = ("q_proj", "v_proj")


def trained(rng, out=48, in_=40, rank=8, *, decay=0.8):
    """B and A near their initialisation: rows of A equally long, a spectrum that falls but leaves no direction idle."""
    A = rng.uniform(-1, 1, (rank, in_)) / in_**0.5
    left = draw_basis(rng, out, rank)
    turn = draw_basis(rng, rank, rank)
    B = 0.1 * (left * decay ** np.arange(rank)) @ turn
    return B.astype(np.float32), A.astype(np.float32)


def scaling(alpha, rank, rule="alpha/r"):
    return Scaling(rule, alpha, rank, "adapter_config.json")


def healthy(seed=0, *, blocks=4, rank=8, alpha=16.0, rule="alpha/r", config=None, make=trained, **said):
    """Two modules in every block, made by ``make(rng)``."""
    rng = np.random.default_rng(seed)
    modules = {}
    for block in range(blocks):
        for kind in KINDS:
            B, A = make(rng) if make is not trained else trained(rng, rank=rank)
            r = A.shape[0]
            how = scaling(alpha, r, rule)
            modules[f"model.layers.{block}.self_attn.{kind}"] = LowRank(B, A, scale_of(alpha, r, rule), scaling=how)
    return loralens.Adapter(modules=modules, config=config or {"r": rank, "lora_alpha": alpha}, **said)


def changed(adapter, f, *, only=lambda name: True):
    """The adapter with B, A and scale of some modules made anew by ``f(B, A, scale)``."""

    def new(name, module):
        if not only(name):
            return module
        B, A, scale = f(module.B.astype(np.float64), module.A.astype(np.float64), module.scale)
        how = scaling(scale * A.shape[0], A.shape[0])
        return LowRank(B.astype(np.float32), A.astype(np.float32), scale, scaling=how)

    modules = {name: new(name, module) for name, module in adapter.items()}
    return loralens.Adapter(modules=modules, config=adapter.config, metadata=adapter.metadata, format=adapter.format)


def patient(adapter, path="adapter") -> Examination:
    return examine_all({path: adapter})[0]


def diagnose(adapters, **options) -> list[Diagnosis]:
    """The findings of all checks; the options are those of `examine_all`."""
    return run_checks(examine_all(adapters, **options))


def base(adapter, *, ratio=0.02, dtype=np.float32, prefix="", seed=1, leave_out=()) -> Base:
    """Gaussian weights for every module, of which ‖ΔW‖ is ``ratio``."""
    rng = np.random.default_rng(seed)
    tensors = {"model.norm.weight": np.ones(8, np.float32)}
    for name, module in adapter.items():
        if name in leave_out:
            continue
        W = rng.normal(size=module.shape)
        W *= np.linalg.norm(module.dense()) / (ratio * np.linalg.norm(W)) if module.dense().any() else 1.0
        tensors[f"{prefix}{name}.weight"] = W.astype(dtype)
    return Base("the base", {key: LazyArray.of(array) for key, array in tensors.items()})
