"""Every low-bit layout against the software that owns it: the same tensors, the same numbers to the last bit.

Software that rounds its result to the dtype of the scales is compared after our float32 numbers are rounded to it, and
once more with scales in float32 where it accepts these.
"""

import ml_dtypes
import numpy as np
import pytest

from loralens.formats import open_checkpoint
from tests.formats.low_bit.cases import CASES, bitsandbytes, packed
from tests.formats.low_bit.test_layouts import same_bits, write

torch = pytest.importorskip("torch")


def tensor(array):
    """An array as a tensor of torch, also of the dtypes that NumPy lacks."""
    bits = {"bfloat16": (np.int16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
    if str(array.dtype) in bits:
        numpy, own = bits[str(array.dtype)]
        return torch.from_numpy(np.array(array).view(numpy)).view(own)
    return torch.from_numpy(np.array(array))


def read(case, folder):
    return open_checkpoint(write(folder, case.tensors, case.config)).tensors[case.key].read()


@pytest.mark.live
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("shape", "block"), [((48, 128), 64), ((6, 256), 128), ((40, 512), 64), ((5, 7), 64)])
def test_bitsandbytes_decodes_4_bits_to_the_same_numbers(kind, nested, shape, block, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    case = bitsandbytes(kind, shape, block=block, nested=nested)
    beside = {key.removeprefix("a.weight."): tensor(array) for key, array in case.tensors.items() if key != case.key}
    state = functional.QuantState.from_dict(beside, device="cpu")
    state.dtype = torch.float32
    theirs = functional.dequantize_4bit(tensor(case.tensors[case.key]), state)
    same_bits(read(case, tmp_path), theirs.numpy())


@pytest.mark.live
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_what_bitsandbytes_quantises_is_read(kind, nested, tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    W = torch.randn(48, 320, generator=torch.Generator().manual_seed(0))
    codes, state = functional.quantize_4bit(W, quant_type=kind, compress_statistics=nested, blocksize=64)
    held = {f"a.weight.{key}": value.numpy() for key, value in state.as_dict(packed=True).items()}
    ours = open_checkpoint(write(tmp_path, {"a.weight": codes.numpy(), **held})).tensors["a.weight"].read()
    same_bits(ours, functional.dequantize_4bit(codes, state).numpy())


@pytest.mark.live
def test_bitsandbytes_decodes_int8_to_the_same_numbers(tmp_path):
    functional = pytest.importorskip("bitsandbytes").functional
    case = CASES["int8"]()
    theirs = functional.int8_vectorwise_dequant(tensor(case.tensors["a.weight"]), tensor(case.tensors["a.SCB"]))
    same_bits(read(case, tmp_path), theirs.numpy())


@pytest.mark.live
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize(("bits", "symmetric", "groups"), [(4, True, 3), (4, False, 3), (4, False, 1), (8, False, 3)])
def test_compressed_tensors_decodes_words_to_the_same_numbers(dtype, bits, symmetric, groups, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    case = packed(bits=bits, symmetric=symmetric, groups=groups, dtype=dtype)
    strategy = {"strategy": "channel"} if groups == 1 else {"strategy": "group", "group_size": case.facts["size"]}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **strategy)
    )
    state = {key.removeprefix("a."): tensor(array) for key, array in case.tensors.items()}
    theirs = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    ours = read(case, tmp_path)
    assert theirs.dtype == tensor(np.zeros(1, dtype)).dtype
    same_bits(ours.astype(dtype).astype(np.float32), theirs.float().numpy())


@pytest.mark.live
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_compressed_tensors_decodes_e2m1_to_the_same_numbers(form, tmp_path):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    case = CASES[form]()
    own = (
        {"strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
        if form == "nvfp4"
        else {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
    )
    weights = QuantizationArgs(num_bits=4, type="float", symmetric=True, **own)
    state = {key.removeprefix("a."): tensor(array) for key, array in case.tensors.items()}
    compressor = NVFP4PackedCompressor if form == "nvfp4" else MXFP4PackedCompressor
    theirs = compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=weights))["weight"]
    ours = read(case, tmp_path)
    # It rounds to bfloat16, which every number of MXFP4 is already.
    same_bits(ours.astype(ml_dtypes.bfloat16).astype(np.float32), theirs.float().numpy())


@pytest.mark.live
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("mlx")])
def test_mlx_decodes_to_the_same_numbers(name, tmp_path):
    mx = pytest.importorskip("mlx.core")
    case = CASES[name]()
    # In float32: with scales of 16 bits mlx rounds the product and the sum to 16 bits.
    scales, biases = (mx.array(case.tensors[f"a.{part}"].astype(np.float32)) for part in ("scales", "biases"))
    codes = mx.array(case.tensors["a.weight"])
    theirs = mx.dequantize(codes, scales, biases, group_size=case.facts["size"], bits=case.facts["bits"])
    same_bits(read(case, tmp_path), np.array(theirs))


@pytest.mark.live
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_mlx_decodes_e2m1_to_the_same_numbers(mode, tmp_path):
    mx = pytest.importorskip("mlx.core")
    case = CASES[f"{mode} of mlx"]()
    codes, scales = (mx.array(case.tensors[f"a.{part}"]) for part in ("weight", "scales"))
    size = case.config["quantization"]["group_size"]
    theirs = mx.dequantize(codes, scales, group_size=size, bits=4, mode=mode, dtype=mx.float32)
    same_bits(read(case, tmp_path), np.array(theirs))


@pytest.mark.slow
def test_transformers_decodes_gpt_oss_to_the_same_numbers(tmp_path):
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    case = CASES["mxfp4 of gpt-oss"]()
    blocks, scales = (tensor(case.tensors[f"a.gate_up_proj_{part}"]) for part in ("blocks", "scales"))
    theirs = integration.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    same_bits(read(case, tmp_path), theirs.numpy())
