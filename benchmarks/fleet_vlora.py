"""vlora-dev on some adapters: the errors of ΔW with as many 8-bit components as fit into some bytes.

    python fleet_vlora.py BYTES ADAPTER ADAPTER … [+ ADAPTER ADAPTER …]

A plus sign begins another group, with bases of its own. Each group gives one line.

vlora-dev (PyPI, 1.0.0) makes one basis for the flattened A and one for the flattened B of every layer. So it depends on
the gauge: (B R)(R⁻¹ A) is the same update with other factors. The last numbers show that: the errors after every
adapter was given a gauge of its own (a rotation) and bases of the same size were made again, and the error of one
adapter in another gauge (a rotation, and any invertible matrix) in the bases of the first ones.
"""

import json
import sys
from statistics import median

import numpy as np
import torch
from vlora import SharedSubspace
from vlora.io import LoRAWeights

import loralens


def rotation(rng, r):
    return np.linalg.qr(rng.standard_normal((r, r)))[0]


def invertible(rng, r):
    return rng.standard_normal((r, r))


def weights(adapter, rng=None, gauge=rotation):
    """The factors as vlora reads them, in another gauge if there is a generator. The scale is part of B."""
    a, b = {}, {}
    for name, module in adapter.items():
        A, B = module.A.astype(np.float64), module.scale * module.B.astype(np.float64)
        if rng is not None:
            R = gauge(rng, len(A))
            A, B = np.linalg.solve(R, A), B @ R
        a[name], b[name] = (torch.tensor(X, dtype=torch.float32) for X in (A, B))
    return LoRAWeights(list(adapter), a, b, next(iter(adapter.modules.values())).rank)


def error(before, after):
    """‖ΔW − ΔW'‖/‖ΔW‖ of one adapter."""
    lost = total = 0.0
    for name in before.layer_names:
        W = before.lora_b[name].double() @ before.lora_a[name].double()
        lost += float(((W - after.lora_b[name].double() @ after.lora_a[name].double()) ** 2).sum())
        total += float((W**2).sum())
    return (lost / total) ** 0.5


def errors(subspace, given):
    """The error of every adapter."""
    return [error(before, subspace.reconstruct(f"task_{task}")) for task, before in enumerate(given)]


def size(given, k):
    """Bytes of k 8-bit components and an 8-bit mean for every factor, and of 16-bit loadings."""
    numbers = sum(x.numel() for side in (given[0].lora_a, given[0].lora_b) for x in side.values())
    return numbers * (k + 1) + 2 * 2 * k * len(given) * len(given[0].layer_names)


def main():
    budget, words = int(sys.argv[1]), sys.argv[2:]
    groups = [[]]
    for word in words:
        if word == "+":
            groups.append([])
        else:
            groups[-1].append(word)
    for paths in groups:
        print(json.dumps(measure(budget, paths)), flush=True)


def measure(budget, paths):
    """The components, the bytes and the errors of one group."""
    adapters = [loralens.load(path, strict=False) for path in paths]
    names = list(adapters[0])
    if any(list(adapter) != names for adapter in adapters):
        raise SystemExit("the adapters have other names of modules")
    given = [weights(adapter) for adapter in adapters]
    k = max(1, max((k for k in range(1, len(given) + 1) if size(given, k) <= budget), default=1))
    subspace = SharedSubspace.from_adapters(given, num_components=k)
    subspace.quantize(bits=8)
    rng = np.random.default_rng(0)
    turned = [weights(adapter, rng) for adapter in adapters]
    again = SharedSubspace.from_adapters(turned, num_components=k)
    again.quantize(bits=8)
    single = {}
    for gauge in (rotation, invertible):
        task = gauge.__name__
        subspace.add_task(subspace.project(weights(adapters[0], rng, gauge), task))
        single[task] = error(given[0], subspace.reconstruct(task))
    first, second = errors(subspace, given), errors(again, turned)
    return {
        "components": k, "bytes": size(given, k), "median error": round(median(first), 4),
        "largest error": round(max(first), 4), "median error in other gauges": round(median(second), 4),
        "errors": first, "errors in other gauges": second,
        "error of one in another gauge": {task: round(value, 4) for task, value in single.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
