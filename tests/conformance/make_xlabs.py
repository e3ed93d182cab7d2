"""Makes the conformance folder xlabs: keys of XLabs' FLUX processors, and the rows of BFL's weights that they change.

Run by hand: ``python -m tests.conformance.make_xlabs``. XLabs' trainer is a set of scripts for FLUX.1 as released, so
the formula is written out: ``up @ down`` is added to q, k and v, which are the first 3·h rows of a single block's
linear1 (7·h rows in all), and to the projections. Nothing here imports loralens.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
MODULES = {  # stored → weight, rows of the update, inputs, rows of the weight
    "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 12, 4, 12),
    "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 12, 4, 12),
    "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", 4, 4, 4),
    "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", 4, 4, 4),
    "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1", 12, 4, 28),
    "single_blocks.1.processor.proj_lora": ("single_blocks.1.linear2", 4, 20, 4),
}


def main() -> None:
    tensors, expected = {}, {}
    for seed, (key, (name, rows, inputs, out)) in enumerate(MODULES.items()):
        rng = np.random.default_rng(seed)
        up = rng.standard_normal((rows, 2)).astype(np.float32)
        down = rng.standard_normal((2, inputs)).astype(np.float32)
        tensors |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
        expected[name] = np.zeros((out, inputs))
        expected[name][:rows] = up.astype(np.float64) @ down.astype(np.float64)
    folder = HERE / "xlabs"
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "lora.safetensors")
    save_file(expected, folder / "expected.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
