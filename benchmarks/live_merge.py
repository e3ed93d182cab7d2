"""``loralens.watching.LiveSwitchboard`` against PEFT: cycles of merging and unmerging an adapter that is trained.

    python -m benchmarks.live_merge [CYCLES] [CASE …] [--threads N]

Cases: ``block`` (the default) is a Llama of one block (512, 1408) in bf16, ``many`` one of eight blocks (128, 352), and
``bf16``, ``f16`` and ``f32`` are a single layer (4096, 4096). PEFT's adapter has rank 16 on all linear layers, and its
factors change before every cycle. Both sides have the same model and take turns, and the side that is first changes
from cycle to cycle. Times are the CPU time of the process with one thread of torch and of NumPy's BLAS; with several
threads they are elapsed times, which need a quiet machine. The first cycles, in which memory is allocated and plans are
made, count for neither side. The ratio is that of both times in one cycle. Its quartiles say how much it varies, and
its interval where the median of more cycles would be (95 %).
"""

import copy
import json
import math
import os
import statistics
import sys
import time
import warnings
from typing import Any

CYCLES = 1000
WARM = {"block": 10, "many": 10}  # cycles that do not count; those of a single large layer are alike from the second on
# What a step of training adds to each factor, on average; after 1,000 steps ΔW is 1.6 % of W in the block.
STEP = 1e-4


def measure(cycles: int, case: str = "block", threads: int = 1) -> dict[str, Any]:
    """Weights changed, largest drift, seconds per cycle and bytes for both sides."""
    import peft
    import torch

    from loralens.watching import LiveSwitchboard

    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    base, targets = _base(case)
    sides = {}
    for name in ("peft", "ours"):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets)
        sides[name] = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    weights = {n: p.detach().clone() for n, p in sides["peft"].named_parameters() if n.endswith("base_layer.weight")}
    board = LiveSwitchboard(sides["ours"])
    merges = {"peft": sides["peft"].merge_adapter, "ours": board.merge}
    unmerges = {"peft": sides["peft"].unmerge_adapter, "ours": board.unmerge}
    seconds: dict[str, list[float]] = {"peft": [], "ours": []}
    patch = factors = 0
    warm = WARM.get(case, 2)
    for cycle in range(warm + cycles):
        for name in ("peft", "ours") if cycle % 2 else ("ours", "peft"):
            _train(sides[name], cycle)
            begun = clock()
            merges[name]()
            middle = clock()
            if name == "ours":
                used = board.bytes()
                patch = max(patch, used.patch)
                factors = max(factors, used.total - used.patch)
            again = clock()
            unmerges[name]()
            seconds[name].append(clock() - again + middle - begun)
    size = sum(tensor.numel() for tensor in weights.values())
    adapted = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
    result: dict[str, Any] = {"case": case, "cycles": cycles, "threads": threads, "weights": size}
    result["adapted_bytes"] = adapted
    for name, model in sides.items():
        now = dict(model.named_parameters())
        changed = sum(int((now[key] != tensor).sum()) for key, tensor in weights.items())
        drift = max(float((now[key].float() - tensor.float()).abs().max()) for key, tensor in weights.items())
        result[name] = {
            "changed": changed / size,
            "drift": drift,
            "seconds": _spread(seconds[name][warm:]),
            "patch_share": patch / adapted if name == "ours" else 0,
            "factor_share": factors / adapted if name == "ours" else 0,
        }
    ratios = [ours / theirs for ours, theirs in zip(seconds["ours"][warm:], seconds["peft"][warm:], strict=True)]
    return result | {"ratio": _spread(ratios), "threads_of_blas": os.environ.get("OPENBLAS_NUM_THREADS")}


def _base(case: str) -> tuple[Any, Any]:
    """A model, and the layers that are adapted."""
    import torch
    import transformers

    torch.manual_seed(0)
    if case in ("block", "many"):
        width, inner, blocks = (512, 1408, 1) if case == "block" else (128, 352, 8)
        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks,
            num_attention_heads=8, num_key_value_heads=8,
        )  # fmt: skip
        model: Any = transformers.LlamaForCausalLM(config)
        return model.to(torch.bfloat16), "all-linear"
    layer = torch.nn.Linear(4096, 4096, bias=False)
    torch.nn.init.normal_(layer.weight, std=0.02)  # as a Llama begins
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[case]
    return torch.nn.ModuleDict({"linear": layer.to(dtype)}), ["linear"]


def _train(model: Any, cycle: int) -> None:
    """One step: both sides get the same one."""
    import torch

    generator = torch.Generator().manual_seed(cycle)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.add_(STEP * torch.randn(parameter.shape, generator=generator))


def _spread(numbers: list[float]) -> dict[str, float]:
    """The least, the quartiles and the largest, and the interval of the median with 95 % confidence."""
    ordered = sorted(numbers)
    count = len(ordered)
    low, median, high = statistics.quantiles(ordered, n=4) if count > 1 else (ordered[0],) * 3
    # The number of values below the median has a binomial distribution; as in the normal distribution, 1.96 deviations.
    half = 0.98 * math.sqrt(count)
    interval = [ordered[max(0, math.floor((count - 1) / 2 - half))]]
    interval.append(ordered[min(count - 1, math.ceil((count - 1) / 2 + half))])
    named = {"least": ordered[0], "quarter": low, "median": median, "three_quarters": high, "most": ordered[-1]}
    return {key: float(f"{value:.4g}") for key, value in named.items()} | {
        "median_from": float(f"{interval[0]:.4g}"),
        "median_to": float(f"{interval[1]:.4g}"),
    }


if __name__ == "__main__":
    given = sys.argv[1:]
    number = 1
    if "--threads" in given:
        place = given.index("--threads")
        number = int(given[place + 1])
        del given[place : place + 2]
    cycles = int(given.pop(0)) if given and given[0].isdigit() else CYCLES
    for one in given or ["block"]:
        sys.stdout.write(json.dumps(measure(cycles, one, number), indent=1) + "\n")
