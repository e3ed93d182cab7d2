"""``loralens.merging.Switchboard`` against PEFT on one model: merged switching, unmerged switching, drift, bytes."""

import json
import os
import subprocess
import sys

# A Llama of 4 blocks (1024, 2816), bf16, two adapters of rank 16 on all linear layers, ‖ΔW‖/‖W‖ about 1 %. The two
# sides have a model each and take turns. What is timed is a switch from one adapter to the other; PEFT's merged switch
# is unmerge_adapter, set_adapter, merge_adapter. A forward pass has one sequence of 16 tokens; the least time counts.
SCRIPT = """
import copy, json, statistics, sys, tempfile, time, warnings
import numpy as np, torch, transformers, peft
import loralens
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.merging.resident.switchboard import Switchboard
warnings.simplefilter("ignore")
runs, threads = int(sys.argv[1]), int(sys.argv[2])
torch.manual_seed(0)
torch.set_num_threads(threads)
config = transformers.LlamaConfig(
    vocab_size=2000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
    num_key_value_heads=16,
)
ours = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
theirs = copy.deepcopy(ours)
base = {key: value.clone() for key, value in ours.state_dict().items()}

def adapter(seed):
    rng, modules = np.random.default_rng(seed), {}
    for name, layer in ours.named_modules():
        if name.endswith("_proj"):
            out, in_ = layer.out_features, layer.in_features
            B, A = rng.standard_normal((out, 16), np.float32), rng.standard_normal((16, in_), np.float32)
            modules[name] = LowRank((B * 5e-5).astype(np.float32), A, 1.0)
    return Adapter(modules=modules)

tasks = {name: adapter(seed) for seed, name in enumerate("ab")}
start = time.perf_counter()
board = Switchboard(ours, tasks, threads=threads)
made = time.perf_counter() - start
with tempfile.TemporaryDirectory() as folder:
    for name, task in tasks.items():
        loralens.save(task, f"{folder}/{name}")
    live = peft.PeftModel.from_pretrained(theirs, f"{folder}/a", adapter_name="a").eval()
    live.load_adapter(f"{folder}/b", adapter_name="b")
ids = torch.arange(16)[None]

def peft_merged(name):
    live.unmerge_adapter()
    live.set_adapter(name)
    live.merge_adapter()

def forward(model):
    with torch.no_grad():
        model(ids)

def timed(act, *args):
    start = time.perf_counter()
    act(*args)
    return time.perf_counter() - start

board.switch("a")
live.merge_adapter()
seconds = {key: [] for key in ("ours", "peft_merged", "peft_unmerged", "forward_merged", "forward_unmerged")}
for turn in range(runs + 1):
    name = "ba"[turn % 2]
    sample = {"ours": timed(board.switch, name), "peft_merged": timed(peft_merged, name)}
    forward(ours)
    sample["forward_merged"] = min(timed(forward, ours) for _ in range(3))
    live.unmerge_adapter()
    sample["peft_unmerged"] = timed(live.set_adapter, "ab"[turn % 2])
    live.set_adapter(name)
    forward(live)
    sample["forward_unmerged"] = min(timed(forward, live) for _ in range(3))
    live.merge_adapter()
    for key, value in sample.items():
        if turn:
            seconds[key].append(value)
held = board.bytes()
to_base = timed(board.switch, None)
live.unmerge_adapter()
changed, weights = {"ours": 0, "peft": 0}, 0
for name in tasks["a"]:
    W = base[f"{name}.weight"]
    weights += W.numel()
    changed["ours"] += int((ours.get_submodule(name).weight != W).sum())
    changed["peft"] += int((theirs.get_submodule(name).base_layer.weight != W).sum())
middle = {key: (min if "forward" in key else statistics.median)(values) for key, values in seconds.items()}
print(json.dumps({
    "milliseconds": {key: round(1e3 * value, 2) for key, value in middle.items()},
    "made_ms": round(1e3 * made, 1), "to_base_ms": round(1e3 * to_base, 1),
    "ratio_to_peft_merged": round(middle["ours"] / middle["peft_merged"], 2),
    "forward_unmerged_over_merged": round(middle["forward_unmerged"] / middle["forward_merged"], 2),
    "mib": {
        "adapted_weights": round(2 * weights / 2**20, 1),
        "factors_of_a_task": round(held.factors["a"] / 2**20, 2),
        "patch_of_the_current_task": round(held.patch / 2**20, 2),
    },
    "patch_bits_a_weight": round(8 * held.patch / weights, 3),
    "weights_changed_after_all": {key: value / weights for key, value in changed.items()},
    "runs": runs, "threads": threads, "torch": torch.__version__, "peft": peft.__version__,
}))
"""


def run(*, runs: int) -> dict[str, object]:
    """Latency of a switch, forward passes, bytes kept, and what is left of the base, on both sides."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(runs), str(threads)], capture_output=True, text=True, check=True, env=env
    )
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    print(json.dumps(run(runs=5), indent=2))
