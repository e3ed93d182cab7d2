"""A small fleet on disk: a run, copies of a member in other forms, strangers, heads, and other tensors."""

from pathlib import Path

import numpy as np

import loralens
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.scaling import Scaling
from loralens.fleet.joint.code_group import FleetSource

NAMES = tuple(f"model.layers.{block}.self_attn.{kind}" for block in (0, 1) for kind in ("q_proj", "v_proj"))
OUT, IN, RANK, SPACE = 40, 48, 4, 5
HEAD = "base_model.model.classifier.weight"


def factors(rng, spaces, noise=0.02):
    """Pairs (B, A) of all modules whose columns and rows lie in the spaces up to noise, float32."""
    pairs = []
    for U, V in spaces:
        B = U @ rng.standard_normal((SPACE, RANK)) + noise * rng.standard_normal((OUT, RANK))
        A = V @ rng.standard_normal((SPACE, RANK)) + noise * rng.standard_normal((IN, RANK))
        pairs.append((B.astype(np.float32), A.T.astype(np.float32)))
    return pairs


def adapter(pairs, *, scale=2.0, head=None, dtype=np.float32):
    alpha = scale * pairs[0][0].shape[1]
    scaling = Scaling("alpha/r", alpha, pairs[0][0].shape[1], "adapter_config.json")
    modules = {
        name: LowRank(B.astype(dtype), A.astype(dtype), scale, scaling=scaling)
        for name, (B, A) in zip(NAMES, pairs, strict=True)
    }
    extra = {} if head is None else {HEAD: Extra("saved", "classifier", LazyArray.of(head))}
    config = {
        "peft_type": "LORA", "r": pairs[0][0].shape[1], "lora_alpha": alpha, "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": "tiny/base", "task_type": "SEQ_CLS",
        "modules_to_save": None if head is None else ["classifier"],
    }  # fmt: skip
    return Adapter(modules=modules, extra=extra, config=config, base_model="tiny/base")


def make(root: Path) -> dict[str, FleetSource]:
    """Write the fleet and return its sources: run0–run5 share spaces, and c… are copies of run0."""
    rng = np.random.default_rng(0)

    def spaces():
        return [(rng.standard_normal((OUT, SPACE)), rng.standard_normal((IN, SPACE))) for _ in NAMES]

    shared, head = spaces(), rng.standard_normal((3, IN)).astype(np.float32)
    first = factors(rng, shared)
    runs = [first, *(factors(rng, shared) for _ in range(5))]
    adapters = {f"run{i}": adapter(pairs, head=head) for i, pairs in enumerate(runs)}
    adapters["run5"] = adapter(runs[5], head=(head * 2))
    turned = []
    for B, A in first:
        R = rng.standard_normal((RANK, RANK)) + 3 * np.eye(RANK)
        turned.append(((B @ R).astype(np.float32), (np.linalg.inv(R) @ A).astype(np.float32)))
    adapters["copy-gauge"] = adapter(turned)
    adapters["copy-scale"] = adapter([(4 * B, A) for B, A in first], scale=0.5)
    adapters["copy-half"] = adapter(first, dtype=np.float16)
    adapters["stranger"] = adapter(factors(rng, spaces()), head=head)
    adapters["zero"] = adapter([(0 * B, A) for B, A in first])
    sources = {}
    for name, each in adapters.items():
        loralens.save(each, root / name)
        original = "run0" if name.startswith("copy") else ""
        sources[name] = FleetSource(name, str(root / name), copy_of=original)
    return sources
