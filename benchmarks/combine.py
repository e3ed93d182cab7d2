"""``loralens combine`` against its floor (read both files, write one as large), and four modules against PEFT's svd."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import alternate

FLOOR = """
import os, sys
import numpy, ml_dtypes, safetensors, click
target = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
buffer = memoryview(bytearray(1 << 20))
for i in (1, 2):
    source = os.open(sys.argv[i], os.O_RDONLY)
    while count := os.readv(source, [buffer]):
        if i == 1:
            os.write(target, buffer[:count])
"""

MAKE = """
import sys
from pathlib import Path
from benchmarks.synthetic import adapter
for seed in (1, 2):
    adapter(Path(sys.argv[1]) / f"r16-seed{seed}", rank=16, seed=seed)
"""

# Four attention modules with inputs of width 2048, two adapters of rank 16, combined to rank 16: PEFT's `svd` (ΔW of
# both adapters, the sum, and a dense SVD of the sum), run by PEFT itself, and what loralens does.
MODULES = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from peft import LoraConfig, get_peft_model
from loralens.arithmetic.combine import combine_adapters
from loralens.compression.loss import losses
from loralens.compression.plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.ranks import Rule
torch.manual_seed(0)
SHAPES = {"q": (2048, 2048), "k": (256, 2048), "v": (256, 2048), "o": (2048, 2048)}
base = torch.nn.ModuleDict({n: torch.nn.Linear(i, o, bias=False) for n, (o, i) in SHAPES.items()})
config = LoraConfig(r=16, lora_alpha=32, target_modules=list(SHAPES), init_lora_weights=False)
model = get_peft_model(base, config, adapter_name="one")
model.add_adapter("two", config)
def adapter(name):
    layers = {n: model.base_model.model[n] for n in SHAPES}
    return Adapter(modules={
        n: LowRank(x.lora_B[name].weight.detach().numpy(), x.lora_A[name].weight.detach().numpy(), 2.0)
        for n, x in layers.items()
    })
pair = [(adapter("one"), 0.7), (adapter("two"), 0.3)]
def truncate(adapter):
    plan = TruncationPlan.of(adapter)
    after = plan.at(plan.ranks(Rule("rank", 16)))
    losses(adapter, after)
    return after
def ours():
    return truncate(combine_adapters(pair).adapter)
ours()
start = time.perf_counter()
result = ours()
loralens_seconds = time.perf_counter() - start
start = time.perf_counter()
model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="svd", svd_rank=16)
peft_seconds = time.perf_counter() - start
far = 0.0
for n in SHAPES:
    theirs = model.base_model.model[n].get_delta_weight("both").detach().numpy().astype(np.float64)
    mine = result[n].dense()
    far = max(far, float(np.linalg.norm(mine - theirs) / np.linalg.norm(mine)))
start = time.perf_counter()
truncate(combine_adapters(pair, method="ties", density=0.2, whole=0).adapter)
loralens_ties = time.perf_counter() - start
start = time.perf_counter()
model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "ties", combination_type="ties_svd", svd_rank=16, density=0.2)
peft_ties = time.perf_counter() - start
print(json.dumps({
    "peft_ties_seconds": round(peft_ties, 3), "loralens_ties_seconds": round(loralens_ties, 4),
    "peft_seconds": round(peft_seconds, 3), "loralens_seconds": round(loralens_seconds, 4),
    "times_faster": round(peft_seconds / loralens_seconds), "largest_difference": far,
}))
"""

# One module of 4096 × 4096, two adapters of rank 16: every elementwise method in the full space, compared with the time
# to form both ΔW once: as float64 matrices (`LowRank.dense`), as float32 matrices (what PEFT forms), and as the blocks
# that the methods work on, which never leave the cache. One thread.
ELEMENTWISE = """
import json, time
import ml_dtypes, numpy as np
from loralens.arithmetic.methods import METHODS
from loralens.arithmetic.elementwise import Modules
from loralens.arithmetic.subspace_methods import entries_in_space
from loralens.core.joint import Joint
from loralens.core.lowrank import LowRank
rng = np.random.default_rng(0)
N, R = 4096, 16
def update():
    B, A = rng.standard_normal((N, R)) * 0.01, rng.standard_normal((R, N)) / 64
    return LowRank(B.astype(ml_dtypes.bfloat16), A.astype(ml_dtypes.bfloat16), 2.0)
pair = [update(), update()]
joint = Joint.of(pair, [0.7, 0.3])
entries = entries_in_space(joint, "full").entries
def blocks():
    for _ in entries.blocks():
        pass
def method(name):
    row = METHODS[name]
    settings = row.settings({})
    if row.prepare:  # the pass over the whole adapter is part of the work
        settings |= row.prepare(Modules(["one"], lambda name: joint, N * N), **settings)
    return row.rule(joint, **settings, **({"seed": np.random.SeedSequence(0)} if row.seeded else {}))
names = [name for name, row in METHODS.items() if row.spaces]
works = {
    "float64": lambda: [one.dense() for one in pair],
    "float32": lambda: [2 * (one.B.astype(np.float32) @ one.A.astype(np.float32)) for one in pair],
    "blocks": blocks,
    **{n: (lambda n=n: method(n)) for n in names},
}
FORMING = ("float64", "float32", "blocks")
seconds = {name: [] for name in works}
for turn in range(6):
    for name, work in works.items():
        start = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - start)
best = {name: min(taken[1:]) for name, taken in seconds.items()}
print(json.dumps({
    "forming": {way: round(best[way], 4) for way in FORMING},
    **{
        n: {"seconds": round(best[n], 4), **{f"to_{way}": round(best[n] / best[way], 2) for way in FORMING}}
        for n in names
    },
    "goal_ties_to_forming": 3.0,
}))
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory for two 7B adapters of rank 16 in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-c", MAKE, str(data)], check=True)
    with TemporaryDirectory(dir=data) as folder:
        report = _compare([data / "r16-seed1", data / "r16-seed2"], Path(folder), runs=runs)
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True)
    one = subprocess.run(
        [sys.executable, "-c", ELEMENTWISE],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    return report | {
        "four_modules_against_peft": json.loads(done.stdout),
        "elementwise_one_module": json.loads(one.stdout),
    }


def _compare(sources: list[Path], folder: Path, *, runs: int) -> dict[str, object]:
    loralens = str(Path(sys.executable).with_name("loralens"))
    pair = [f"{sources[0]}:0.7", f"{sources[1]}:0.3"]
    combine = [loralens, "combine", *pair, "-o", str(folder / "out"), "--overwrite", "--json", "--rank", "16"]
    files = [str(source / "adapter_model.safetensors") for source in sources]
    figures = alternate(
        {
            "floor": [sys.executable, "-c", FLOOR, *files, str(folder / "copy")],
            **{method: [*combine, "--method", method] for method in ("sum", "tsv-m", "iso-c")},
        },
        runs=runs,
    )
    records: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    floor, plain = figures["floor"].seconds, figures["sum"].seconds
    ratios = {
        "sum_ratio": round(plain / floor, 2),
        "tsv_m_to_sum": round(figures["tsv-m"].seconds / plain, 2),
        "iso_c_to_sum": round(figures["iso-c"].seconds / plain, 2),
    }
    return records | ratios | {"goal": 3.5, "goal_to_sum": 2.0}
