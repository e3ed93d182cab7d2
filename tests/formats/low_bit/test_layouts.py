"""Every low-bit layout: its numbers entry by entry, its grid, and its bytes from the codes of the grid."""

import json
from hashlib import sha256

import numpy as np
import pytest

from loralens.formats import open_checkpoint
from tests.bases import single
from tests.formats.files import shapes
from tests.formats.low_bit.cases import CASES, gptq, mlx, packed


def write(folder, tensors, config=None):
    return single(folder, tensors, config=config or {})


def same_bits(ours, theirs):
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_the_numbers_are_those_of_the_reference_whole_and_by_rows(case, tmp_path):
    beside = {"norm.weight": np.ones(4, np.float16)}
    base = write(tmp_path / "base", case.tensors | beside, case.config)
    found = open_checkpoint(base)
    assert set(found.tensors) == {case.key, "norm.weight"}
    assert shapes(base) == {case.key: case.W.shape, "norm.weight": (4,)}
    W, weight = found.tensors[case.key], found.coded[case.key]
    same_bits(W.read(), case.W)
    assert W.streams
    rows = len(case.W)
    for start, stop in ((0, 1), (1, rows), (rows - 1, rows), (1, 1), (0, rows)):
        same_bits(W.rows(start, stop).read(), case.W[start:stop])
    assert (weight.layout, weight.shape, weight.stored) == (case.layout, case.W.shape, case.codes)
    assert weight.bits == pytest.approx(8 * sum(t.nbytes for t in case.tensors.values()) / case.W.size)
    (note,) = found.notes
    assert (note.level, note.text) == ("note", f"1 weights are {case.layout}, read as float32")


def test_the_grid_gives_the_numbers_and_its_codes_give_the_bytes(case, tmp_path):
    weight = open_checkpoint(write(tmp_path / "base", case.tensors, case.config)).coded[case.key]
    assert weight.grid
    assert weight.encode
    rows, width = len(case.W), case.W[0].size
    grid = weight.grid(0, rows)
    assert (grid.codes.dtype, grid.codes.shape, grid.step.dtype) == (np.int16, (rows, width), np.float32)
    assert grid.group_of_column.shape == (width,)
    assert grid.group_of_column.max() < grid.step.shape[1]
    assert grid.lowest <= grid.codes.min() <= grid.codes.max() <= grid.highest
    values = grid.values(grid.codes).reshape(case.W.shape)
    if case.exact:
        np.testing.assert_array_equal(values, case.W)
    np.testing.assert_allclose(values, case.W, rtol=2e-7)
    if grid.levels is not None:
        assert np.all(np.diff(grid.levels) >= 0)
    stored = case.tensors[case.codes].reshape(-1).view(np.uint8)
    data = weight.encode(0, grid.codes)
    assert data.dtype == np.uint8
    np.testing.assert_array_equal(data.reshape(-1), stored)
    part = weight.grid(1, rows)
    np.testing.assert_array_equal(part.codes, grid.codes[1:])
    np.testing.assert_array_equal(part.step, grid.step[1:])
    if weight.by_rows:
        assert data.shape == (rows, stored.size // rows)
        np.testing.assert_array_equal(weight.encode(1, part.codes), data[1:])


def test_other_codes_are_read_back_as_the_grid_says(case, tmp_path):
    weight = open_checkpoint(write(tmp_path / "base", case.tensors, case.config)).coded[case.key]
    assert weight.grid
    assert weight.encode
    grid = weight.grid(0, len(case.W))
    # Another code everywhere, from one end of the range to the other.
    codes = grid.lowest + (grid.codes - grid.lowest + 3) % (grid.highest - grid.lowest + 1)
    codes = codes.astype(np.int16)
    held = case.tensors[case.codes]
    data = weight.encode(0, codes).reshape(-1).view(held.dtype).reshape(held.shape)
    again = open_checkpoint(write(tmp_path / "again", case.tensors | {case.codes: data}, case.config))
    expected = grid.values(codes).reshape(case.W.shape)
    np.testing.assert_allclose(again.tensors[case.key].read(), expected, rtol=2e-7, atol=0)


def test_bits_beyond_a_row_stay(tmp_path):
    case = packed(shape=(20, 51))
    case.tensors["a.weight_packed"][:, -1] |= np.int32(0x70000000)
    weight = open_checkpoint(write(tmp_path, case.tensors)).coded["a.weight"]
    assert weight.grid
    assert weight.encode
    data = weight.encode(3, weight.grid(3, 20).codes)
    np.testing.assert_array_equal(data, case.tensors["a.weight_packed"][3:].view(np.uint8))


def test_a_module_of_mlx_does_not_take_its_mode_from_the_others(tmp_path):
    first, second = CASES["mxfp4 of mlx"](), mlx(8, 96, name="b")
    first.config["quantization"]["b"] = {"group_size": 96, "bits": 8}
    found = open_checkpoint(write(tmp_path, first.tensors | second.tensors, first.config))
    layouts = {key: weight.layout for key, weight in found.coded.items()}
    assert layouts == {"a.weight": "MLX MXFP4", "b.weight": "MLX 8-bit"}
    same_bits(found.tensors["b.weight"].read(), second.W)


@pytest.mark.parametrize("name", ["nf4", "int8", "gptq"])
def test_layers_of_gpt2_come_as_they_are_stored_in_floats(name, tmp_path):
    case = CASES[name]()
    tensors = {key.replace("a.", f"{own}.", 1): array for key, array in case.tensors.items() for own in ("h.c_fc", "x")}
    found = open_checkpoint(write(tmp_path, tensors, case.config | {"model_type": "gpt2"}))
    W, weight = found.tensors["h.c_fc.weight"], found.coded["h.c_fc.weight"]
    same_bits(W.read(), np.ascontiguousarray(case.W.T))
    same_bits(W.rows(3, 7).read(), np.ascontiguousarray(case.W.T[3:7]))
    same_bits(weight.decode(3, 7), np.ascontiguousarray(case.W.T[3:7]))
    assert (weight.shape, weight.grid, shapes(tmp_path)["h.c_fc.weight"]) == (case.W.T.shape, None, case.W.T.shape)
    # Other layers of the model are linear.
    same_bits(found.tensors["x.weight"].read(), case.W)


def test_scales_of_activations_are_not_among_the_tensors(tmp_path):
    case = CASES["nvfp4"]()
    case.tensors |= {"a.input_global_scale": np.ones(1, np.float32), "a.k_scale": np.ones((), np.float32)}
    assert set(open_checkpoint(write(tmp_path, case.tensors)).tensors) == {"a.weight"}


def test_gptq_may_keep_its_settings_in_a_file_of_its_own(tmp_path):
    case = CASES["gptq"]()
    write(tmp_path, case.tensors)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32}))
    same_bits(open_checkpoint(tmp_path).tensors["a.weight"].read(), case.W)


def test_gptq_without_g_idx_has_groups_of_neighbours(tmp_path):
    case = CASES["gptq"]()
    del case.tensors["a.g_idx"]
    same_bits(open_checkpoint(write(tmp_path, case.tensors, case.config)).tensors["a.weight"].read(), case.W)


# The numbers that gptqmodel 7.7.0 (`dequantize_weight`, for "gptq" after `_correct_gptq_v1_qzeros`) and autoawq 0.2.9
# (`dequantize_gemm`) give for these tensors with scales in float32: the first digits of their SHA-256, as (out, in).
ORACLES = {
    "gptq, 2 bits": "75419f2f325fbe42", "gptq": "2748241d6c851c7a", "gptq, 8 bits": "da25eca634cbaf4c",
    "gptq v2": "a0943139eb71d93f", "awq": "43d23b269b9e96af",
}  # fmt: skip
ORDERS = {2: "f791fb174875d99b", 3: "947acbdf17f9bdfb", 4: "77031743bc37178d", 8: "17db4a99198ffe3f"}


@pytest.mark.parametrize("name", [*ORACLES, *ORDERS])
def test_the_numbers_are_those_of_gptqmodel_and_autoawq(name, tmp_path):
    case = CASES[name]() if name in ORACLES else gptq(name, version="gptq_v2", order=True)
    W = open_checkpoint(write(tmp_path, case.tensors, case.config)).tensors["a.weight"].read()
    assert sha256(W.tobytes()).hexdigest()[:16] == (ORACLES | ORDERS)[name]
