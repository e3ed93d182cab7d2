"""XLabs' FLUX processors: which weights they change, and files that are not theirs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, LoraLensError, ShapeError
from loralens.formats.dialects import lycoris, xlabs
from loralens.formats.dialects.comfyui import reader as comfyui
from loralens.formats.dialects.diffusers import reader as diffusers
from loralens.formats.dialects.kohya import reader as kohya
from loralens.formats.dialects.peft import reader as peft
from loralens.formats.files.container import Stored, read_safetensors
from tests.formats.stores import numbered
from tests.formats.test_fuzz import read_everything
from tests.marks import examples

CONFORMANCE = Path(__file__).parent.parent / "conformance" / "xlabs" / "lora.safetensors"
DOUBLE, SINGLE = "double_blocks.7.processor", "single_blocks.3.processor"
Shapes = Mapping[str, tuple[int, ...]]


def pair(name: str, out: int = 4, in_: int = 4, r: int = 2) -> Shapes:
    return {f"{name}.down.weight": (r, in_), f"{name}.up.weight": (out, r)}


@pytest.mark.parametrize(
    ("key", "out", "name"),
    [
        (f"{DOUBLE}.qkv_lora1", 12, "double_blocks.7.img_attn.qkv"),
        (f"{DOUBLE}.qkv_lora2", 12, "double_blocks.7.txt_attn.qkv"),
        (f"{DOUBLE}.proj_lora1", 4, "double_blocks.7.img_attn.proj"),
        (f"{DOUBLE}.proj_lora2", 4, "double_blocks.7.txt_attn.proj"),
        (f"{SINGLE}.qkv_lora", 12, "single_blocks.3.linear1"),
        (f"{SINGLE}.proj_lora", 4, "single_blocks.3.linear2"),
        (f"diffusion_model.{DOUBLE}.proj_lora1", 4, "diffusion_model.double_blocks.7.img_attn.proj"),
    ],
)
def test_names_and_scale(key: str, out: int, name: str) -> None:
    source = numbered(pair(key, out))
    assert xlabs.detect(source)
    assert not any(form.detect(source) for form in (peft, kohya, lycoris, diffusers, comfyui))
    adapter = xlabs.read(source)
    assert list(adapter) == [name]
    assert (adapter[name].scale, adapter[name].scaling.formula) == (1.0, "given")
    np.testing.assert_array_equal(adapter[name].A, source.tensors[f"{key}.down.weight"].read())
    np.testing.assert_array_equal(adapter[name].B[:out], source.tensors[f"{key}.up.weight"].read())


def test_the_mlp_s_rows_of_linear1_are_zero_and_as_many_as_linear2_says() -> None:
    alone = xlabs.read(numbered(pair(f"{SINGLE}.qkv_lora", 12)))
    assert alone["single_blocks.3.linear1"].shape == (28, 4)
    assert [finding.code for finding in alone.findings] == ["width-assumed"]

    both = xlabs.read(numbered({**pair(f"{SINGLE}.qkv_lora", 12), **pair(f"{SINGLE}.proj_lora", 4, 14)}))
    module = both["single_blocks.3.linear1"]
    assert both.findings == ()
    assert module.shape == (22, 4)
    assert module.B[:12].any(axis=1).all()
    assert not module.B[12:].any()
    assert module.origin is not None
    assert sorted(module.origin.tensors) == [f"{SINGLE}.qkv_lora.down.weight", f"{SINGLE}.qkv_lora.up.weight"]


def test_leftovers_are_kept_and_named() -> None:
    adapter = xlabs.read(numbered({**pair(f"{DOUBLE}.proj_lora1"), f"{DOUBLE}.ip_adapter_k": (4, 4)}))
    assert {key: one.role for key, one in adapter.extra.items()} == {f"{DOUBLE}.ip_adapter_k": "other"}
    assert [finding.code for finding in adapter.findings] == ["tensor-unread"]


BROKEN = {
    "half": ({f"{DOUBLE}.proj_lora1.down.weight": (2, 4)}, FormatError, "has no B beside it"),
    "empty": (pair(f"{DOUBLE}.proj_lora1", r=0), ShapeError, "are not a pair"),
    "conv": (
        {**pair(f"{DOUBLE}.proj_lora1"), f"{DOUBLE}.proj_lora1.down.weight": (2, 4, 1, 1)},
        ShapeError,
        "a pair of matrices",
    ),
    "rank": ({**pair(f"{DOUBLE}.proj_lora1"), f"{DOUBLE}.proj_lora1.down.weight": (3, 4)}, ShapeError, "multiply"),
    "qkv": (pair(f"{SINGLE}.qkv_lora", 8), ShapeError, "do not fit a model 4 wide"),
    "narrow": ({**pair(f"{SINGLE}.qkv_lora", 12), **pair(f"{SINGLE}.proj_lora", 4, 3)}, ShapeError, "do not fit"),
    "a bomb": ({**pair(f"{SINGLE}.qkv_lora", 12), **pair(f"{SINGLE}.proj_lora", 4, 9999)}, ShapeError, "9995 rows"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_with_its_place(case: str) -> None:
    shapes, kind, message = BROKEN[case]
    with pytest.raises(kind, match=message) as caught:
        xlabs.read(numbered(shapes))
    assert caught.value.where


FOREIGN = {
    "diffusers": pair("down_blocks.0.attn1.processor.to_q_lora"),
    "layers": pair("unet.down_blocks.0.attn1.to_q.lora"),
    "kohya": {"lora_unet_x.lora_down.weight": (2, 4), "lora_unet_x.lora_up.weight": (4, 2)},
    "mixed": {**pair(f"{DOUBLE}.proj_lora1"), **pair("x.to_q.lora")},
    "a layer that single blocks do not have": pair(f"{SINGLE}.qkv_lora1"),
    "nothing": {},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others(case: str) -> None:
    assert not xlabs.detect(numbered(FOREIGN[case]))


def test_the_conformance_file_is_nobody_else_s() -> None:
    source = read_safetensors(CONFORMANCE)
    assert xlabs.detect(source)
    assert not any(form.detect(source) for form in (peft, kohya, lycoris, diffusers, comfyui))


KEYS = st.builds(
    "{}.processor.{}.{}".format,
    st.sampled_from(["double_blocks.0", "single_blocks.0", "diffusion_model.single_blocks.1", "x"]),
    st.sampled_from(["qkv_lora", "qkv_lora1", "proj_lora", "proj_lora2"]),
    st.sampled_from(["up.weight", "down.weight", "down.bias"]),
)
TENSORS = st.tuples(
    st.sampled_from([np.float32, np.float16, np.int64, np.complex64]), st.lists(st.integers(0, 6), max_size=4)
)


@pytest.mark.slow
@examples(150, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(KEYS, TENSORS, max_size=6), st.booleans())
def test_any_tensors_give_an_adapter_or_an_error_of_ours(tensors: Any, good: bool) -> None:
    if good:
        tensors |= {key: (np.float32, shape) for key, shape in pair("single_blocks.0.processor.qkv_lora", 12).items()}
    source = Stored({key: LazyArray.of(np.ones(shape, dtype)) for key, (dtype, shape) in tensors.items()})
    xlabs.detect(source)
    try:
        read_everything(xlabs.read(source))
    except LoraLensError:
        return
