"""``loralens.watching.LiveSwitchboard`` against PEFT: 1,000 cycles of merging and unmerging an adapter that is trained.

    python -m benchmarks.live_merge [CYCLES]

Both sides have the same model: a Llama of one block (512, 1408) in bf16 with PEFT's adapter of rank 16 on all linear
layers, whose factors change before every cycle. Times are medians of the CPU time of a cycle, both sides by turns.
"""

import copy
import json
import statistics
import sys
import time
import warnings
from typing import Any


def measure(cycles: int) -> dict[str, Any]:
    """Weights changed, largest drift, seconds per cycle and bytes for both sides."""
    import peft
    import torch
    import transformers

    from loralens.watching import LiveSwitchboard

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=1408, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=8,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    sides = {}
    for name in ("peft", "ours"):
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear")
        sides[name] = peft.get_peft_model(copy.deepcopy(base), lora).eval()
    weights = {n: p.detach().clone() for n, p in sides["peft"].named_parameters() if n.endswith("base_layer.weight")}
    board = LiveSwitchboard(sides["ours"])
    seconds: dict[str, list[float]] = {"peft": [], "ours": []}
    patch = factors = 0
    for cycle in range(cycles):
        for name, model in sides.items():
            draws = torch.Generator().manual_seed(cycle)
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if "lora_" in key:
                        parameter.add_(1e-4 * torch.randn(parameter.shape, generator=draws))
            merge, unmerge = (
                (model.merge_adapter, model.unmerge_adapter) if name == "peft" else (board.merge, board.unmerge)
            )
            begun = time.process_time()
            merge()
            middle = time.process_time()
            if name == "ours":
                used = board.bytes()
                patch = max(patch, used.patch)
                factors = max(factors, used.total - used.patch)
            again = time.process_time()
            unmerge()
            seconds[name].append(time.process_time() - again + middle - begun)
    size = sum(tensor.numel() for tensor in weights.values())
    result: dict[str, Any] = {"cycles": cycles, "weights": size, "adapted_bytes": 2 * size}
    for name, model in sides.items():
        now = dict(model.named_parameters())
        changed = sum(int((now[key] != tensor).sum()) for key, tensor in weights.items())
        drift = max(float((now[key].float() - tensor.float()).abs().max()) for key, tensor in weights.items())
        result[name] = {
            "changed": changed / size,
            "drift": drift,
            "seconds": statistics.median(seconds[name]),
            "patch_bytes": patch if name == "ours" else 0,
            "factor_bytes": factors if name == "ours" else 0,
        }
    return result


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 1000), indent=1))
