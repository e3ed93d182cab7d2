"""Quantised bases are refused by name, from headers alone; where shapes tell the names, names are enough."""

import json

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import loralens
from loralens.cli.main import main
from loralens.errors import FormatError
from loralens.formats.models.checkpoint import shapes, weights
from tests.conftest import small_adapter


def codes(dtype, *shape):
    return np.zeros(shape, dtype)


NORM = {"norm.weight": codes(np.float16, 4)}
# name → tensors beside a 16-bit norm, config.json, whether weights keep their names and shapes
BASES = {
    "bitsandbytes NF4": (
        {"a.weight": codes(np.uint8, 12, 1), "a.weight.absmax": codes(np.uint8, 1),
         "a.weight.quant_map": codes(np.float32, 16),
         "a.weight.quant_state.bitsandbytes__nf4": codes(np.uint8, 40)}, {}, False),
    "bitsandbytes FP4": (
        {"a.weight": codes(np.uint8, 12, 1), "a.weight.quant_state.bitsandbytes__fp4": codes(np.uint8, 40)}, {}, False),
    "bitsandbytes 4-bit": (
        {"a.weight": codes(np.uint8, 12, 1), "a.weight.absmax": codes(np.float32, 1),
         "a.weight.quant_map": codes(np.float32, 16)},
        {}, False),
    "bitsandbytes int8": ({"a.weight": codes(np.int8, 6, 4), "a.SCB": codes(np.float32, 6)}, {}, True),
    "GPTQ": (
        {"a.qweight": codes(np.int32, 1, 6), "a.qzeros": codes(np.int32, 1, 1), "a.scales": codes(np.float16, 1, 6),
         "a.g_idx": codes(np.int32, 4)}, {}, False),
    "AWQ": (
        {"a.qweight": codes(np.int32, 4, 1), "a.qzeros": codes(np.int32, 1, 1), "a.scales": codes(np.float16, 1, 6)},
        {"quantization_config": {"quant_method": "awq"}}, False),
    "MLX": (
        {"a.weight": codes(np.uint32, 6, 1), "a.scales": codes(np.float16, 6, 1), "a.biases": codes(np.float16, 6, 1)},
        {"quantization": {"bits": 4}}, False),
    "compressed-tensors": (
        {"a.weight_packed": codes(np.int32, 6, 1), "a.weight_scale": codes(np.float16, 6, 1)}, {}, False),
    "NVFP4 (modelopt)": (
        {"a.weight": codes(np.uint8, 6, 2), "a.weight_scale": codes(ml_dtypes.float8_e4m3fn, 6, 1),
         "a.weight_scale_2": codes(np.float32, 1)}, {}, False),
    "MXFP4": (
        {"experts.up_proj_blocks": codes(np.uint8, 2, 6, 1, 16), "experts.up_proj_scales": codes(np.uint8, 2, 6, 1)},
        {}, False),
    "HQQ": ({"a.W_q": codes(np.uint8, 3, 4)}, {}, False),
    "AQLM": ({"a.codes": codes(np.int16, 1, 1, 1), "a.codebooks": codes(np.float16, 1, 1, 1, 8)}, {}, False),
    "quanto": ({"a.weight._data": codes(np.int8, 6, 4), "a.weight._scale": codes(np.float16, 6, 1)}, {}, False),
    "integer": ({"a.weight": codes(np.int8, 6, 4), "a.weight_scale": codes(np.float16, 6, 1)},
                {"quantization_config": {"quant_method": "compressed-tensors"}}, True),
    "eetq": ({"a.weight": codes(np.int8, 6, 4)}, {"quantization_config": {"quant_method": "eetq"}}, True),
}  # fmt: skip


@pytest.mark.parametrize("name", BASES)
def test_it_is_refused_by_name_with_the_way_out(name, tmp_path):
    tensors, config, shaped = BASES[name]
    save_file({**NORM, **tensors}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "_name_or_path": "org/model-quantised"}))
    with pytest.raises(FormatError, match="quantised: ") as error:
        weights(tmp_path)
    assert f"quantised: {name} (org/model-quantised)" in str(error.value)
    assert "16-bit model it was made from" in error.value.fix
    if shaped:
        assert shapes(tmp_path)["a.weight"] == (6, 4)
    else:
        with pytest.raises(FormatError, match="quantised: "):
            shapes(tmp_path)


def test_gptq_without_g_idx_is_known_by_its_configuration(tmp_path):
    save_file(BASES["AWQ"][0], tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
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
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert set(weights(tmp_path)) == set(tensors)


@pytest.mark.parametrize("command", [["amplify"], ["spectrum"], ["intruders"], ["inspect"]])
def test_every_command_refuses_it_or_needs_only_names(command, tmp_path):
    adapter = tmp_path / "adapter"
    loralens.save(small_adapter(), adapter)
    for name in ("bitsandbytes NF4", "bitsandbytes int8"):
        base = tmp_path / name
        base.mkdir()
        tensors = {}
        for module in small_adapter():
            tensors |= {key.replace("a.", f"{module}.", 1): value for key, value in BASES[name][0].items()}
        save_file(tensors, base / "model.safetensors")
        result = CliRunner().invoke(main, [*command, str(adapter), "--base", str(base)])
        if command == ["inspect"] and name == "bitsandbytes int8":
            assert "6/6 modules match" in result.stdout
            assert result.exit_code == 0
        else:
            assert result.exit_code == 2, result.output
            assert f"its weights are quantised: {name}" in result.stderr
            assert "Traceback" not in result.output
