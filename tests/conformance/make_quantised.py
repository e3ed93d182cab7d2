"""Makes the conformance folder quantised: a ``loralens-q`` file written number by number from its description.

Run by hand: ``python -m tests.conformance.make_quantised``. Bits are put into bytes one at a time, and ΔW is summed
over directions in float64. Nothing here imports loralens.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
MODULES = {  # name → out, in, bits of each direction, scaling, layout
    "model.layers.0.self_attn.q_proj": (6, 5, [8, 4, 4], 0, 0),
    "model.layers.0.self_attn.v_proj": (3, 7, [16, 3], 1, 0),
    "model.conv": (4, 18, [2], 0, 1),
}
SCALINGS = [[4.0, "alpha/r", 8, 2, "adapter_config.json"], [-0.5, "given", None, None, "by hand"]]
LAYOUTS = [["linear", [], 1, False], ["conv", [3, 3], 1, False]]


def packed(numbers, bits):
    """Two's complement, least significant bit first, one line after another from a byte of its own."""
    stream = [(int(number) >> t) & 1 for number in numbers for t in range(bits)]
    stream += [0] * (-len(stream) % 8)
    return bytes(sum(bit << t for t, bit in enumerate(stream[i : i + 8])) for i in range(0, len(stream), 8))


def module(rng, out, in_, bits):
    """The bytes of a module, and B·A in float64."""
    scales = np.exp2(rng.integers(-6, 2, (2, len(bits)))).astype("<f4")
    sides: list[list[np.ndarray]] = [[], []]
    for b in bits:
        n = 2 ** (b - 1) - 1
        for side, count in zip(sides, (out, in_), strict=True):
            side.append(rng.integers(-n, n + 1, count))
    data = bytes(bits) + scales.tobytes()
    for side in sides:
        data += b"".join(packed(line, b) for line, b in zip(side, bits, strict=True))
    delta = np.zeros((out, in_))
    for i in range(len(bits)):
        delta += np.outer(float(scales[0, i]) * sides[0][i], float(scales[1, i]) * sides[1][i])
    return np.frombuffer(data, np.uint8), delta


def main() -> None:
    rng = np.random.default_rng(7)
    tensors, expected, modules = {}, {}, {}
    for name, (out, in_, bits, scaling, layout) in MODULES.items():
        tensors[f"{name}.q"], delta = module(rng, out, in_, bits)
        expected[name] = SCALINGS[scaling][0] * delta
        modules[name] = [out, in_, len(bits), scaling, layout]
    tensors["extra/base_model.model.score.weight"] = rng.standard_normal((2, 3)).astype(np.float32)
    said = {
        "version": 1,
        "source": "peft",
        "base_model": "tiny/base",
        "modules": modules,
        "scalings": SCALINGS,
        "layouts": LAYOUTS,
        "extra": {"base_model.model.score.weight": ["saved", "score", "weight"]},
        "findings": [],
        "config": {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "conv"]},
        "metadata": {"format": "pt"},
        "narrowed": False,
    }
    folder = HERE / "quantised"
    folder.mkdir(exist_ok=True)
    save_file(
        tensors, folder / "adapter_quantised.safetensors", {"format": "loralens-q", "loralens-q": json.dumps(said)}
    )
    save_file(expected, folder / "expected.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
