"""Low-bit weights whose parts are missing, damaged or hostile: an error that names the weight, and little memory."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from loralens import FormatError, LoraLensError
from loralens.formats import open_checkpoint
from tests.formats.blobs import limits
from tests.formats.low_bit.cases import CASES, bitsandbytes, four_bit_floats, gptq, packed
from tests.formats.low_bit.test_layouts import write

MIB = 1 << 20
# Parts without which a weight is still read: what bitsandbytes itself does not need, and groups that are neighbours.
OPTIONAL = ("quant_map", "weight_format", "g_idx", "weight_zero_point")


def read_all(folder):
    found = open_checkpoint(folder)
    for key, weight in found.coded.items():
        found.tensors[key].read()
        grid = weight.grid(0, weight.shape[0])
        weight.encode(0, grid.codes)


@pytest.mark.some(10)
@pytest.mark.parametrize("name", CASES)
def test_a_part_that_is_missing_or_has_another_shape_or_dtype_is_named(name, tmp_path):
    whole = CASES[name]()
    for number, key in enumerate(whole.tensors):
        optional = key.endswith(OPTIONAL) and not key.endswith("nested_quant_map")
        array = whole.tensors[key]
        flat = array.reshape(-1)
        damages = {
            "missing": None, "longer": np.concatenate([flat] * 2), "shorter": flat[:-1], "bool": np.ones((), np.bool_)
        }  # fmt: skip
        for damage, other in damages.items():
            if optional and (damage == "missing" or key.endswith(("quant_map", "weight_format"))):
                continue
            # Without its codes or what marks them, a weight is not there at all, or is one of another method.
            tensors = {k: a for k, a in whole.tensors.items() if k != key} | ({} if other is None else {key: other})
            folder = write(tmp_path / f"{number}{damage}", tensors, whole.config)
            if damage == "missing":
                try:
                    assert whole.key not in open_checkpoint(folder).coded
                except FormatError:
                    continue
                continue
            try:
                read_all(folder)
            except FormatError:
                continue
            assert whole.key not in open_checkpoint(folder).coded, (name, key, damage)


STATES = {
    "not JSON": b"{",
    "without a shape": b'{"blocksize": 64}',
    "no numbers": b'{"blocksize": 64, "shape": ["12", 128]}',
    "another size": b'{"blocksize": 64, "shape": [12, 256]}',
    "a huge shape": b'{"blocksize": 64, "shape": [1000000000000, 1000000000000]}',
    "a huge block": b'{"blocksize": 1e400, "shape": [12, 128]}',
    "another block": b'{"blocksize": 32, "shape": [12, 128]}',
    "deep": b"[" * 5000,
    "too long": b'{"blocksize": 64, "shape": [12, 128], "x": "' + b"x" * 70000 + b'"}',
}


@pytest.mark.parametrize("state", STATES)
def test_a_hostile_state_of_bitsandbytes_is_refused(state, tmp_path):
    case = bitsandbytes("nf4", (12, 128))
    key = next(key for key in case.tensors if "quant_state" in key)
    write(tmp_path, case.tensors | {key: np.frombuffer(STATES[state], np.uint8)})
    with limits(2, 4 * MIB), pytest.raises(FormatError, match=r"a\.weight: "):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("field", [{"nested_offset": None}, {"nested_offset": 1e300}, {"nested_blocksize": 0}])
def test_a_hostile_nested_state_is_refused(field, tmp_path):
    case = bitsandbytes("nf4", (40, 512), nested=True)
    key = next(key for key in case.tensors if "quant_state" in key)
    state = json.loads(case.tensors[key].tobytes()) | field
    write(tmp_path, case.tensors | {key: np.frombuffer(json.dumps(state).encode(), np.uint8)})
    with pytest.raises(FormatError, match="nested_"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_a_group_that_does_not_exist_is_refused(group, tmp_path):
    case = gptq(4, order=True)
    case.tensors["a.g_idx"][5] = group
    write(tmp_path / "gptq", case.tensors, case.config)
    with pytest.raises(FormatError, match="g_idx has group numbers outside 0 to 2"):
        open_checkpoint(tmp_path / "gptq").tensors["a.weight"].read()
    # compressed-tensors means by −1 that there is no order.
    if group != -1:
        case = packed(order=True)
        case.tensors["a.weight_g_idx"][5] = group
        write(tmp_path / "packed", case.tensors)
        with pytest.raises(FormatError, match="weight_g_idx has group numbers outside 0 to 2"):
            open_checkpoint(tmp_path / "packed").tensors["a.weight"].read()


@pytest.mark.parametrize("shape", [[20, 2**60], [0, 96], [-20, 96], [96, 20]])
def test_a_hostile_shape_of_compressed_tensors_is_refused(shape, tmp_path):
    case = packed()
    case.tensors["a.weight_shape"] = np.array(shape, np.int64)
    write(tmp_path, case.tensors)
    with limits(2, 4 * MIB), pytest.raises(FormatError, match=r"a\.weight: "):
        open_checkpoint(tmp_path)


ODD = [None, True, 0, -4, 7, 2.0, "4", [4], {}, 2**80]


@pytest.mark.some(24)
@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("name", ["bits", "group_size", "a", "mode", "checkpoint_format", "version"])
def test_odd_settings_give_an_answer_or_an_error(name, value, tmp_path):
    for layout in ("mlx, 4 bits", "gptq", "awq"):
        case = CASES[layout]()
        (settings,) = case.config.values()
        settings[name] = value
        try:
            read_all(write(tmp_path / layout[:4], case.tensors, case.config))
        except FormatError as error:
            assert "a.weight" in str(error)  # noqa: PT017


def test_steps_that_are_not_finite_give_what_the_software_gives(tmp_path):
    case = four_bit_floats("MXFP4")
    case.tensors["a.weight_scale"][0, 0] = 255
    W = open_checkpoint(write(tmp_path, case.tensors)).tensors["a.weight"].read()
    assert not np.isfinite(W[0, :32]).any()
    assert np.isfinite(W[1:]).all()


@pytest.mark.parametrize("name", ["mlx, 4 bits", "int4", "nvfp4"])
def test_rows_are_read_in_the_memory_of_these_rows(name, tmp_path):
    rows = 2048
    # The parts of the small case, repeated to the size.
    small = CASES[name]()
    out, width = small.W.shape
    rows -= rows % out
    tensors = {k: np.repeat(a, rows // out, axis=0) if a.ndim > 1 else a for k, a in small.tensors.items()}
    if name == "int4":
        tensors["a.weight_shape"] = np.array([rows, width], np.int64)
    write(tmp_path, tensors, small.config)
    W = open_checkpoint(tmp_path).tensors["a.weight"]
    assert W.shape[0] == rows
    with limits(5, 16 * 4 * W.shape[1] * 16 + MIB // 4):
        W.rows(100, 116).read()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_damaged_parts_give_numbers_or_an_error(name, data):
    case = CASES[name]()
    keys = st.sampled_from(sorted(case.tensors))
    for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
        array = case.tensors[key]
        flat = np.ascontiguousarray(array).reshape(-1)
        match data.draw(st.sampled_from(["dtype", "shape", "bytes", "cut"])):
            case "dtype":
                with np.errstate(all="ignore"):
                    case.tensors[key] = array.astype(data.draw(st.sampled_from([np.int8, np.int32, np.float16])))
            case "shape":
                case.tensors[key] = flat.reshape(data.draw(st.sampled_from([(1, -1), (-1,), (1, 1, -1)])))
            case "bytes":
                raw = np.frombuffer(data.draw(st.binary(min_size=flat.nbytes, max_size=flat.nbytes)), array.dtype)
                case.tensors[key] = raw.reshape(array.shape)
            case "cut":
                case.tensors[key] = flat[: data.draw(st.integers(0, flat.size))]
    with TemporaryDirectory() as home, limits(5, 32 * MIB):
        folder = Path(home)
        save_file({key: np.ascontiguousarray(array) for key, array in case.tensors.items()}, folder / "m.safetensors")
        (folder / "config.json").write_text(json.dumps(case.config))
        try:
            read_all(folder)
        except LoraLensError as error:
            assert error.fix  # noqa: PT017
