"""Quantised bases are refused by name, from headers alone; where shapes tell the names, names are enough."""

import numpy as np
import pytest

from loralens import FormatError
from tests.bases import single
from tests.formats.files import shapes, weights


def codes(dtype, *shape):
    return np.zeros(shape, dtype)


NORM = {"norm.weight": codes(np.float16, 4)}
GPTQ = {
    "a.qweight": codes(np.int32, 4, 32), "a.qzeros": codes(np.int32, 1, 4), "a.scales": codes(np.float16, 1, 32),
    "a.g_idx": codes(np.int32, 32),
}  # fmt: skip
AWQ = {"a.qweight": codes(np.int32, 4, 1), "a.qzeros": codes(np.int32, 1, 1), "a.scales": codes(np.float16, 1, 6)}
GEMM = AWQ | {"a.scales": codes(np.float16, 1, 8)}
MLX = {"a.weight": codes(np.uint32, 6, 4), "a.scales": codes(np.uint8, 6, 1)}


def stated(**fields):
    return {"quantization_config": fields}


# name → tensors beside a 16-bit norm, config.json, whether weights keep their names and shapes
BASES = {
    "bitsandbytes 4-bit": (
        {"a.weight": codes(np.uint8, 12, 1), "a.weight.absmax": codes(np.float32, 1),
         "a.weight.quant_map": codes(np.float32, 16)},
        {}, False),
    "GPTQ": (AWQ | {"a.g_idx": codes(np.int32, 4)}, {}, False),
    "GPTQ as marlin": (GPTQ, stated(quant_method="gptq", checkpoint_format="marlin"), False),
    "AWQ": (AWQ, stated(quant_method="awq"), False),
    "AWQ as gemv": (GEMM, stated(quant_method="awq", version="GEMV"), False),
    "MLX mxfp8": (MLX, {"quantization": {"bits": 8, "group_size": 32, "mode": "mxfp8"}}, False),
    "compressed-tensors": ({"a.weight_packed": codes(np.int64, 6, 1)}, {}, False),
    "compressed-tensors with 3 bits": (
        {"a.weight_packed": codes(np.int32, 6, 3), "a.weight_scale": codes(np.float16, 6, 1),
         "a.weight_shape": np.array([6, 32])}, {}, False),
    "HQQ": ({"a.W_q": codes(np.uint8, 3, 4)}, {}, False),
    "quanto": ({"a.weight._data": codes(np.int8, 6, 4), "a.weight._scale": codes(np.float16, 6, 1)}, {}, False),
    "integer": ({"a.weight": codes(np.int8, 6, 4), "a.weight_scale": codes(np.float16, 6, 1)},
                stated(quant_method="compressed-tensors"), True),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_it_is_refused_by_name_with_the_way_out(name, tmp_path):
    tensors, config, shaped = BASES[name]
    single(tmp_path, {**NORM, **tensors}, config={**config, "_name_or_path": "org/model-quantised"})
    with pytest.raises(FormatError, match="quantised: ") as error:
        weights(tmp_path)
    assert f"its weights are quantised: {name}" in str(error.value)
    assert "16-bit model it was made from" in error.value.fix or "keep config.json" in error.value.fix
    if shaped:
        assert shapes(tmp_path)["a.weight"] == (6, 4)
    else:
        with pytest.raises(FormatError, match="quantised: "):
            shapes(tmp_path)


def test_gptq_without_g_idx_is_known_by_its_configuration(tmp_path):
    single(tmp_path, AWQ, config={"quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(FormatError, match="quantised: GPTQ"):
        weights(tmp_path)


def test_16_bit_weights_with_whole_numbers_beside_them_are_read(tmp_path):
    tensors = {
        "a.weight": codes(np.float16, 6, 4), "embeddings.position_ids": codes(np.int64, 1, 5),
        "attn.bias": codes(np.uint8, 1, 1, 5, 5),
        "bn.num_batches_tracked": codes(np.int64),
        "counts.weight": codes(np.int64, 3), "b.scales": codes(np.float32, 2), "x_scales": codes(np.float32, 2),
        "x_blocks": codes(np.float32, 2),
    }  # fmt: skip
    single(tmp_path, tensors, config={"quantization_config": {"quant_method": "bitsandbytes"}})
    assert set(weights(tmp_path)) == set(tensors)
