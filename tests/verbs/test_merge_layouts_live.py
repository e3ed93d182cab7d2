"""Merges into codes, decoded by the software that owns the layout: its numbers are the kept weight plus whole steps."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.formats import open_checkpoint
from tests.draws import draw_adapter

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live
SHAPES = {"model.layers.0.self_attn.q_proj": (96, 128), "model.layers.0.mlp.down_proj": (128, 256)}
Parts = dict[str, Any]


def integers(W: Any, *, symmetric: bool) -> tuple[Parts, Callable[[Parts], Any]]:
    """Codes of compressed-tensors in groups of 64, and what decodes them."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    arguments = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=64)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    groups = W.reshape(len(W), -1, 64)
    state = {"weight": W.clone(), "weight_scale": groups.abs().amax(-1) / 7.5}
    if not symmetric:
        least, largest = groups.amin(-1), groups.amax(-1)
        state["weight_scale"] = (largest - least) / 15
        state["weight_zero_point"] = (-8 - least / state["weight_scale"]).round().clamp(-8, 7).to(torch.int8)
    compressed = PackedQuantizationCompressor.compress(state, scheme)
    return compressed, lambda parts: PackedQuantizationCompressor.decompress(parts, scheme)["weight"]


def floats(W: Any, *, nvidia: bool) -> tuple[Parts, Callable[[Parts], Any]]:
    """NVFP4 or MXFP4 of compressed-tensors, and what decodes them."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    own = (
        {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
        if nvidia
        else {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    )
    arguments = QuantizationArgs(num_bits=4, type="float", symmetric=True, **own)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
    largest = W.reshape(len(W), -1, own["group_size"]).abs().amax(-1)
    if nvidia:
        whole = (448 * 6 / W.abs().max()).reshape(1)
        scale = (largest / 6 * whole).to(torch.float8_e4m3fn).float()
        state = {"weight": W.clone(), "weight_scale": scale, "weight_global_scale": whole}
    else:
        state = {"weight": W.clone(), "weight_scale": 2.0 ** torch.floor(torch.log2(largest / 4))}
    compressor = NVFP4PackedCompressor if nvidia else MXFP4PackedCompressor
    return compressor.compress(state, scheme), lambda parts: compressor.decompress(parts, scheme)["weight"]


def int8(W: Any) -> tuple[Parts, Callable[[Parts], Any]]:
    """bitsandbytes' codes of 8 bits."""
    from bitsandbytes import functional

    codes, scales, _ = functional.int8_vectorwise_quant(W.half())
    return {"weight": codes, "SCB": scales.float()}, lambda p: functional.int8_vectorwise_dequant(p["weight"], p["SCB"])


def four_bits(W: Any, *, kind: str) -> tuple[Parts, Callable[[Parts], Any]]:
    """bitsandbytes' NF4 and FP4."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(W, quant_type=kind, blocksize=64)

    def decode(parts: Parts) -> Any:
        beside = {key.removeprefix("weight."): value for key, value in parts.items() if key != "weight"}
        return functional.dequantize_4bit(parts["weight"], functional.QuantState.from_dict(beside, device="cpu"))

    return {"weight": codes} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}, decode


MLX = {"group_size": 64, "bits": 4}


def mlx(W: Any) -> tuple[Parts, Callable[[Parts], Any]]:
    """MLX's codes of 4 bits."""
    import mlx.core as mx

    names = ("weight", "scales", "biases")
    made = mx.quantize(mx.array(W.numpy()), **MLX)

    def decode(parts: Parts) -> Any:
        return torch.from_numpy(np.array(mx.dequantize(*(mx.array(parts[name].numpy()) for name in names), **MLX)))

    return {name: torch.from_numpy(np.array(part)) for name, part in zip(names, made, strict=True)}, decode


LAYOUTS: dict[str, tuple[str, Callable[[Any], tuple[Parts, Callable[[Parts], Any]]]]] = {
    "int4": ("compressed_tensors", lambda W: integers(W, symmetric=True)),
    "int4, zeros": ("compressed_tensors", lambda W: integers(W, symmetric=False)),
    "nvfp4": ("compressed_tensors", lambda W: floats(W, nvidia=True)),
    "mxfp4": ("compressed_tensors", lambda W: floats(W, nvidia=False)),
    "int8": ("bitsandbytes", int8),
    "nf4": ("bitsandbytes", lambda W: four_bits(W, kind="nf4")),
    "fp4": ("bitsandbytes", lambda W: four_bits(W, kind="fp4")),
    "mlx": ("mlx.core", mlx),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_its_own_software_reads_the_update_out_of_the_merged_codes(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    package, make = LAYOUTS[name]
    pytest.importorskip(package)
    generator = torch.Generator().manual_seed(0)
    stored, decoders, updates = {}, {}, draw_adapter(0, SHAPES, 4, 1.6e-3)
    for module, shape in SHAPES.items():
        parts, decoders[module] = make(0.05 * torch.randn(shape, generator=generator))
        stored |= {f"{module}.{key}": value.contiguous() for key, value in parts.items()}
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    save_file(stored, base / "model.safetensors")
    (base / "config.json").write_text(
        json.dumps({"model_type": "llama"} | ({"quantization": MLX} if name == "mlx" else {}))
    )
    result = loralens.merge(updates, base=base, output=out, bits="keep")
    merged = load_file(out / "model.safetensors")
    coded = open_checkpoint(base).coded
    moved = open_checkpoint(out).coded
    for row in result.modules:
        module = row.fidelity.module
        W, Q = (
            decoders[module]({k.removeprefix(f"{module}."): v for k, v in t.items() if k.startswith(f"{module}.")})
            for t in (stored, merged)
        )
        key, D = f"{module}.weight", updates[module].dense().astype(np.float64)
        before, after = coded[key], moved[key]
        assert before.grid
        assert after.grid
        rows = (0, SHAPES[module][0])
        grid, codes = before.grid(*rows), after.grid(*rows).codes
        # The numbers of other codes under the scales of the base, up to the rounding of the software.
        tolerance = 1e-6 if Q.dtype == torch.float32 else 4e-3
        np.testing.assert_allclose(Q.float().numpy(), grid.values(codes), rtol=tolerance, atol=1e-8)
        change = (Q.float() - W.float()).numpy().astype(np.float64)
        assert np.vdot(change, D) / np.vdot(D, D) == pytest.approx(row.fidelity.gain, abs=5e-3)
        assert 0.8 < row.fidelity.gain < 1.2
    loralens.unmerge(out, output=tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
