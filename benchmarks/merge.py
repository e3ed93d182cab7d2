"""``loralens merge`` on four blocks of a 7B Llama in bf16, against a sketch of 30 lines and against PEFT.

The goals are ratios to the plain sketch. The plain sketch does not wait until its files are on the disk, but loralens
does, before it renames them. ``synced`` is the sketch that waits for the disk too.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.process import Figure, alternate

# A single-threaded merge as one would write it with NumPy: map, float32 row blocks, one thin product, round, write.
SKETCH = """
import json, sys
from pathlib import Path
import ml_dtypes, numpy as np
from safetensors.numpy import load_file
base, adapter, out = map(Path, sys.argv[1:4])
pairs = load_file(adapter / "adapter_model.safetensors")
config = json.loads((adapter / "adapter_config.json").read_text())
scale = config["lora_alpha"] / config["r"]
out.mkdir(exist_ok=True)
for shard in sorted(base.glob("*.safetensors")):
    raw = np.memmap(shard, np.uint8, "r")
    length = int(raw[:8].view("<u8")[0])
    header = json.loads(bytes(raw[8 : 8 + length]))
    header.pop("__metadata__", None)
    with open(out / shard.name, "wb") as stream:
        stream.write(raw[: 8 + length])
        for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            W = raw[start:stop].view(ml_dtypes.bfloat16).reshape(entry["shape"])
            stem = "base_model.model." + key.removesuffix(".weight")
            if stem + ".lora_A.weight" not in pairs:
                stream.write(W)
                continue
            A = pairs[stem + ".lora_A.weight"].astype(np.float32)
            B = scale * pairs[stem + ".lora_B.weight"].astype(np.float32)
            for i in range(0, len(W), 256):
                stream.write((W[i : i + 256].astype(np.float32) + B[i : i + 256] @ A).astype(W.dtype))
for other in base.glob("*.json"):
    (out / other.name).write_bytes(other.read_bytes())
"""

SYNCED = SKETCH.replace("import json, sys", "import json, os, sys").replace(
    "astype(W.dtype))\n", "astype(W.dtype))\n        stream.flush()\n        os.fsync(stream.fileno())\n"
)

PEFT = """
import sys
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def run(data: Path, *, runs: int) -> dict[str, object]:
    """Times, ratios and peak memory for a model and an adapter in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_model", str(data)], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return _compare(data / "llama-4-blocks", data / "llama-4-blocks-r16", Path(folder), runs=runs)


def _compare(base: Path, adapter: Path, folder: Path, *, runs: int) -> dict[str, object]:
    out = str(folder / "out")
    loralens = [str(Path(sys.executable).with_name("loralens")), "merge", str(adapter), "--base", str(base)]
    ours = [*loralens, "-o", out, "--overwrite", "--json"]
    commands = {
        "copy": ["cp", "-r", str(base), str(folder / "copy")],
        "sketch": _sketch(SKETCH, base, adapter, folder),
        "synced": _sketch(SYNCED, base, adapter, folder),
        "bare": [*ours[:-1], "--certificate", "none", "--undo", "none"],
        "certificate": [*ours, "--undo", "none"],
        "undo": ours,
    }
    if find_spec("peft"):
        commands["peft"] = [sys.executable, "-c", PEFT, str(base), str(adapter), str(folder / "peft")]
    figures = alternate(commands, runs=runs)
    same = _same(folder / "sketch", folder / "out", base)
    goals = {"bare": 0.9, "certificate": 1.4, "undo": 1.8}
    records: dict[str, object] = {name: figure.record() for name, figure in figures.items()}
    ratios = {f"{name}_ratio": _ratio(figures, name, "sketch") for name in goals}
    ratios |= {f"{name}_to_synced": _ratio(figures, name, "synced") for name in goals}
    return records | ratios | {"goals": goals, "goal_peak_mib": 300, "weights_that_differ_from_the_sketch": same}


def _sketch(text: str, base: Path, adapter: Path, folder: Path) -> list[str]:
    return ["env", "OPENBLAS_NUM_THREADS=1", sys.executable, "-c", text, *map(str, (base, adapter, folder / "sketch"))]


def _ratio(figures: dict[str, Figure], name: str, other: str) -> float:
    return round(figures[name].seconds / figures[other].seconds, 2)


def _same(sketch: Path, ours: Path, base: Path) -> float:
    """The share of weights that differ between the two results: a float32 product is not exact."""
    count = f"""
import sys
from pathlib import Path
import numpy as np
total = different = 0
for file in sorted(Path({str(base)!r}).glob("*.safetensors")):
    one, two = (np.memmap(Path(folder) / file.name, np.uint16, "r") for folder in ({str(sketch)!r}, {str(ours)!r}))
    for i in range(0, len(one), 1 << 22):
        different += np.count_nonzero(one[i : i + (1 << 22)] != two[i : i + (1 << 22)])
    total += len(one)
print(different / total)
"""
    done = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))
