"""XLabs' FLUX processors: which weights they change, and files that are not theirs."""

from collections.abc import Mapping

import numpy as np
import pytest

from loralens.formats.dialects import comfyui, diffusers, kohya, lycoris, xlabs
from loralens.formats.dialects.peft import reader as peft
from tests.formats.stores import numbered

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
