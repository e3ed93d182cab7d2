"""``loralens merge --bits keep`` on four blocks of a 7B Llama in 4 bits, against others that merge into such bases.

``llama-export-lora`` of llama.cpp writes float16, and PEFT quantises the sum again, which loses the adapter; they are
here for their time and memory. The sketch does the same as ours for Q4_1 in NumPy, on one thread and without records.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import code_merge
from benchmarks.process import Figure, alternate
from benchmarks.rivals import llama_export_lora

GOAL_PEAK_MIB = 300
MOST = 3  # runs of what takes minutes

SKETCH = """
import json, sys
from pathlib import Path
import numpy as np
from gguf import GGUFReader
from safetensors.numpy import load_file
base, adapter, out = map(Path, sys.argv[1:4])
pairs = load_file(adapter / "adapter_model.safetensors")
names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
         "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj"}
rng = np.random.default_rng(0)
data = np.fromfile(base, np.uint8)
for tensor in GGUFReader(base).tensors:
    parts = tensor.name.split(".")
    if parts[0] != "blk" or parts[2] not in names:
        continue
    stem = f"base_model.model.model.layers.{parts[1]}.{names[parts[2]]}"
    A, B = pairs[stem + ".lora_A.weight"], pairs[stem + ".lora_B.weight"]
    if parts[2] in ("attn_q", "attn_k"):
        B = B.reshape(32, 2, -1, B.shape[1]).swapaxes(1, 2).reshape(B.shape)
    rows, width = B.shape[0], A.shape[1]
    stored = data[tensor.data_offset : tensor.data_offset + tensor.n_bytes].reshape(rows, width // 32, 20)
    for i in range(0, rows, 256):
        blocks = stored[i : i + 256]
        step = blocks[..., :2].copy().view(np.float16).astype(np.float32)
        codes = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], axis=-1).astype(np.int16)
        moves = (B[i : i + 256] @ A).reshape(codes.shape) / step
        moves += rng.random(moves.shape, np.float32)
        codes = np.clip(codes + np.floor(moves).astype(np.int16), 0, 15).astype(np.uint8)
        blocks[..., 4:] = codes[..., :16] | codes[..., 16:] << 4
data.tofile(out)
"""

PEFT = """
import sys
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, device_map="cpu")
merged = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
merged.save_pretrained(sys.argv[3], save_original_format=False)  # transformers 5.24 cannot save 4 bits otherwise
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory for the three bases and an adapter in ``data``, made where missing."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_low_bit", str(data)], check=True)
    adapter, records = data / "llama-4-blocks-r16", dict[str, object]()
    for kind in ("Q4_K", "Q4_1", "nf4"):
        base = data / ("llama-4-blocks-nf4" if kind == "nf4" else f"llama-4-blocks.{kind}.gguf")
        with TemporaryDirectory(dir=data) as folder:
            records[kind] = _compare(kind, base, adapter, Path(folder), runs=min(runs, MOST))
    return records | {"one_tensor": code_merge.run(), "goal_peak_mib": GOAL_PEAK_MIB}


def _compare(kind: str, base: Path, adapter: Path, folder: Path, *, runs: int) -> dict[str, object]:
    end = "" if base.is_dir() else ".gguf"
    loralens = str(Path(sys.executable).with_name("loralens"))
    ours = [loralens, "merge", str(adapter), "--base", str(base), "--bits", "keep", "--overwrite", "--quiet"]
    ours += ["-o", str(folder / f"out{end}")]
    commands = {
        "copy": ["cp", "-r", str(base), str(folder / f"copy{end}")],
        "bare": [*ours, "--certificate", "none", "--undo", "none"],
        "undo": ours,
    }
    if kind == "Q4_1":
        one = ["env", "OPENBLAS_NUM_THREADS=1", sys.executable, "-c", SKETCH]
        commands["sketch"] = [*one, str(base), str(adapter), str(folder / "sketch.gguf")]
    missing = _rivals(kind, base, adapter, folder, commands)
    figures = alternate(commands, runs=runs)
    ratios = {
        f"{name}_to_{other}": _ratio(figures, name, other)
        for other in ("copy", "sketch", "llama-export-lora", "peft")
        if other in figures
        for name in ("bare", "undo")
    }
    return {name: figure.record() for name, figure in figures.items()} | ratios | missing


def _rivals(kind: str, base: Path, adapter: Path, folder: Path, commands: dict[str, list[str]]) -> dict[str, object]:
    """Add the commands of others; the row of one that is not there says so."""
    if kind == "nf4":
        if all(map(find_spec, ("peft", "bitsandbytes", "accelerate"))):
            commands["peft"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(folder / "peft")]
            return {}
        return {"peft": "not measured: peft, bitsandbytes or accelerate is not installed"}
    program = llama_export_lora()
    if program.missing:
        return {"llama-export-lora": program.missing}
    theirs = folder / "adapter.gguf"
    loralens = str(Path(sys.executable).with_name("loralens"))
    convert = [loralens, "convert", str(adapter), "--to", "gguf", "--base", str(base), "-o", str(theirs), "--quiet"]
    subprocess.run(convert, check=True, stdout=subprocess.DEVNULL)
    command = [program.path, "-m", str(base), "--lora", str(theirs), "-o", str(folder / "theirs.gguf"), "-t", "2"]
    commands["llama-export-lora"] = command
    return {}


def _ratio(figures: dict[str, Figure], name: str, other: str) -> float:
    return round(figures[name].seconds / figures[other].seconds, 2)
