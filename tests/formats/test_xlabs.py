"""XLabs' FLUX processors: which weights they change, and files that are not theirs."""

from collections.abc import Mapping

from tests.formats.dialects import FORM
from tests.formats.stores import numbered

xlabs = FORM["xlabs"]

SINGLE = "single_blocks.3.processor"
Shapes = Mapping[str, tuple[int, ...]]


def pair(name: str, out: int = 4, in_: int = 4, r: int = 2) -> Shapes:
    return {f"{name}.down.weight": (r, in_), f"{name}.up.weight": (out, r)}


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
