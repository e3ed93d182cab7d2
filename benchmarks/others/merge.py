"""``loralens merge`` into four blocks of a 7B Llama in bf16, against PEFT, axolotl and mergekit.

All write the same model in bf16. PEFT's process does what its users do: it loads the model and the adapter, merges and
saves. Of axolotl, the function is called that `axolotl merge-lora` calls for ``merge_method: memory_efficient``, its
default, with the same arguments; the command itself also reads a configuration of a training. mergekit is given
``base+adapter`` in a ``passthrough`` recipe: it merges with PEFT into a cache of whole models, which is empty before
each run, and copies from there.
"""

import json
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.others.merged import errors, of_models
from benchmarks.process import alternate_writers, read_once
from benchmarks.rivals import Checkout, Rival
from benchmarks.synthetic_model import make_tiny

PEFT = """
import sys
import torch, transformers
from peft import PeftModel
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""

AXOLOTL = """
import sys
from axolotl.cli.utils.lora_merge import merge_lora_sharded_efficient
merge_lora_sharded_efficient(
    base_model_path=sys.argv[1], lora_adapter_path=sys.argv[2], output_path=sys.argv[3], device="cpu", safe_tensors=True
)
"""


def run(data: Path, axolotl: Checkout, mergekit: Rival, *, runs: int) -> dict[str, object]:
    """Times, peaks and errors for a model and an adapter in ``data`` (made where missing)."""
    subprocess.run([sys.executable, "-m", "benchmarks.synthetic_model", str(data)], check=True)
    with TemporaryDirectory(dir=data) as folder:
        return compare(data / "llama-4-blocks", data / "llama-4-blocks-r16", Path(folder), axolotl, mergekit, runs=runs)


def compare(
    base: Path, adapter: Path, folder: Path, axolotl: Checkout, mergekit: Rival, *, runs: int
) -> dict[str, object]:
    """The same as `run`, for these files, with results in ``folder``."""
    missing = _missing(axolotl, mergekit)

    def commands(model: Path, lora: Path) -> dict[str, list[str]]:
        found = _commands(model, lora, folder, axolotl, mergekit)
        return {name: command for name, command in found.items() if name not in missing}

    def judge(tool: str) -> Mapping[str, float]:
        return errors(of_models(base, adapter, {tool: folder / tool / "out"}))[tool]

    read_once(base, adapter)
    warm = commands(*make_tiny(folder / "tiny"))
    tools = alternate_writers(commands(base, adapter), runs=runs, warm=warm, folder=folder, judge=judge)
    return {"nearest_in_bf16": errors(of_models(base, adapter, {}))["nearest"], "tools": tools | missing}


def _commands(base: Path, adapter: Path, folder: Path, axolotl: Checkout, mergekit: Rival) -> dict[str, list[str]]:
    files = [str(base), str(adapter)]
    out = {name: str(folder / name / "out") for name in ("bare", "certificate", "peft", "axolotl", "mergekit")}
    ours = [str(Path(sys.executable).with_name("loralens")), "merge", files[1], "--base", files[0], "--quiet"]
    ours += ["--undo", "none", "-o"]
    recipe = folder / f"{base.name}.yaml"
    told = {"models": [{"model": "+".join(files)}], "merge_method": "passthrough", "dtype": "bfloat16"}
    recipe.write_text(json.dumps(told))  # JSON is YAML
    theirs = ["env", "HF_HUB_OFFLINE=1", mergekit.program("mergekit-yaml"), str(recipe), out["mergekit"]]
    return {
        "bare": [*ours, out["bare"], "--certificate", "none"],
        "certificate": [*ours, out["certificate"]],
        "peft": [sys.executable, "-c", PEFT, *files, out["peft"]],
        "axolotl": axolotl.python("-c", AXOLOTL, *files, out["axolotl"]),
        "mergekit": [*theirs, "--lora-merge-cache", str(folder / "mergekit" / "cache")],
    }


def _missing(axolotl: Checkout, mergekit: Rival) -> dict[str, str]:
    """The rows of what is not there."""
    found = {"axolotl": axolotl.missing, "mergekit": mergekit.missing}
    found["peft"] = "" if find_spec("peft") else "not measured: peft is not installed"
    return {name: text for name, text in found.items() if text}
