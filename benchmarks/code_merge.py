"""The merge into the codes of a single tensor of 4096 × 4096 on one thread, by processor time.

    python -m benchmarks.code_merge

``bare`` computes the update of rank 16, draws the codes and packs them. ``record`` also measures what arrives, makes
the undo patch and hashes the tensor before and after. The times are the least of five runs, without reading a file.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

N, RANK, RUNS = 4096, 16, 5
GOAL_SECONDS = 0.3
SCALES = {"Q4_1": (0.01, -0.07), "Q4_0": (0.01,), "Q8_0": (0.001,), "Q4_K": (0.005, 0.01)}  # float16, first in a block


def run() -> dict[str, Any]:
    """The figures of `measure`, from a process whose BLAS has one thread."""
    quiet = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "benchmarks.code_merge"], check=True, capture_output=True, env=quiet)
    return dict(json.loads(done.stdout))


def measure(size: int = N, runs: int = RUNS) -> dict[str, Any]:
    """Processor seconds for each type, bare and with the record."""
    return {kind: _measure_type(kind, size, runs) for kind in SCALES} | {"goal_seconds": GOAL_SECONDS}


def _measure_type(kind: str, size: int, runs: int) -> dict[str, float]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    from loralens.core.lazy import LazyArray
    from loralens.core.lowrank import LowRank
    from loralens.formats.models.low_bit.gguf_layouts import StoredRows, coded_weight
    from loralens.merging.low_bit.apply import CodeRounding, prepare_codes
    from loralens.merging.low_bit.record import CodesRecorder, encode_rows
    from loralens.merging.plan import Slab, TensorPlan

    rng, number = np.random.default_rng(0), GGMLQuantizationType[kind]
    numbers, nbytes = GGML_QUANT_SIZES[number]
    blocks = rng.integers(0, 256, (size * size // numbers, nbytes), dtype=np.uint8)
    scales = np.array(SCALES[kind], np.float16).view(np.uint8)
    blocks[:, : len(scales)] = scales
    stored = LazyArray.of(blocks.reshape(size, -1))
    weight = coded_weight(StoredRows(stored), int(number), (size, size), stored="w")
    B, A = (rng.standard_normal(shape).astype(np.float32) for shape in ((size, RANK), (RANK, size)))
    slab = Slab("m", 0, size, ((1.0, LowRank(B, A, 3e-5)),))
    plan = TensorPlan("w", weight.floats(), (size, size), (slab,))

    def bare() -> None:
        merge = prepare_codes(plan, weight, CodeRounding(key="w"))
        for _ in encode_rows(weight, ((block.start, block.drawn.codes) for block in merge.blocks())):
            pass

    def record() -> None:
        recorder = CodesRecorder(prepare_codes(plan, weight, CodeRounding(key="w")), stored, ordered=True)
        for _ in recorder.blocks():
            pass
        recorder.record()

    return {each.__name__: round(min(_seconds(each) for _ in range(runs)), 3) for each in (bare, record)}


def _seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    print(json.dumps(measure()))
