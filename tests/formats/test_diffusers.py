"""The diffusers reader and writer on files made by hand; no torch."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given
from hypothesis import strategies as st

from loralens import Adapter, FormatError, LoraLensError, LowRank, MismatchError, ShapeError
from loralens.core import Dense, Extra, Layout, LazyArray, Scaling, Structured
from loralens.core.image_names import in_pipeline
from loralens.formats import Stored
from tests import models
from tests.formats.dialects import FORM
from tests.formats.files import KEY, component
from tests.formats.stores import assert_same_file, codes, number, numbered, valued
from tests.marks import examples

comfyui = FORM["comfyui"]
diffusers = FORM["diffusers"]
write = FORM["diffusers"].write

Q = "unet.down_blocks.0.attn1.to_q"
K = "unet.down_blocks.0.attn1.to_k"
Shapes = Mapping[str, tuple[int, ...]]
fuzz = examples(150, suppress_health_check=[HealthCheck.too_slow])


def stored(shapes: Shapes, said: Mapping[str, Any] | None = None, **rest: Any) -> Stored:
    """Random tensors under these keys; ``said`` becomes the header's configuration."""
    metadata = {"format": "pt"} if said is None else {"format": "pt", KEY: json.dumps(said)}
    return numbered(shapes, metadata=metadata, **rest)


def pair(name: str = Q, r: int = 2, *, A: str = "lora_A.weight", B: str = "lora_B.weight") -> Shapes:
    return {f"{name}.{A}": (r, 4), f"{name}.{B}": (6, r)}


def low_rank(scale: float = 1.0, *, r: int = 2, **more: Any) -> LowRank:
    return models.low_rank(6, 4, r, scale, **more)


# --- names ---

OLD = {  # key of a half without .down.weight → the module it adapts
    f"{Q}.lora": Q,
    "down_blocks.0.attn1.processor.to_q_lora": "unet.down_blocks.0.attn1.to_q",
    "down_blocks.0.attn1.processor.to_out_lora": "unet.down_blocks.0.attn1.to_out.0",
    "unet.mid_block.attn2.processor.add_k_proj_lora": "unet.mid_block.attn2.add_k_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora":
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora":
        "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
    "text_model.encoder.layers.0.self_attn.to_k_lora": "text_encoder.text_model.encoder.layers.0.self_attn.k_proj",
    "transformer.transformer_blocks.0.attn.to_q.lora": "transformer.transformer_blocks.0.attn.to_q",
}  # fmt: skip


@pytest.mark.parametrize("key", OLD)
def test_old_keys_and_the_modules_they_mean(key: str) -> None:
    source = stored({f"{key}.down.weight": (2, 4), f"{key}.up.weight": (6, 2)})
    assert diffusers.detect(source)
    assert list(diffusers.read(source)) == [OLD[key]]
    if not key.startswith(("unet.", "transformer.")):
        adapter = diffusers.read(valued(source, f"{key}.alpha", np.float32(6)))
        assert (adapter[OLD[key]].scale, dict(adapter.extra)) == (3.0, {})


# --- scales ---


@pytest.mark.parametrize("alpha", [np.float32(3), np.int64(3), np.array([[3]], ml_dtypes.bfloat16)])
def test_alpha_tensors(alpha: Any) -> None:
    adapter = diffusers.read(valued(stored(pair(Q)), f"{Q}.alpha", alpha))
    assert adapter[Q].scale == 1.5
    assert adapter[Q].scaling == Scaling("alpha/r", 3.0, 2, "alpha in the file")
    assert not adapter.extra


@pytest.mark.parametrize("bad", [np.float32([1, 2]), np.float32(np.nan), np.True_])
def test_an_alpha_that_is_no_number(bad: Any) -> None:
    with pytest.raises(LoraLensError, match=r"alpha") as caught:
        diffusers.read(valued(stored(pair(Q)), f"{Q}.alpha", bad))
    assert caught.value.where == (Q,)


SAID = {
    "unet.r": 2, "unet.lora_alpha": 6, "unet.rank_pattern": {"^down_blocks.0.attn1.to_k": 3},
    "unet.alpha_pattern": {"attn1.to_k": 1.5}, "text_encoder.r": 4, "text_encoder.lora_alpha": 6,
    "text_encoder.use_rslora": True,
}  # fmt: skip
TE = "text_encoder.encoder.layers.0.self_attn.q_proj"


def test_the_header_wins_and_each_component_has_its_own() -> None:
    adapter = diffusers.read(stored({**pair(Q), **pair(K, 3), **pair(TE, 4)}, SAID))
    assert {name: module.scale for name, module in adapter.items()} == {TE: 3.0, Q: 3.0, K: 0.5}
    assert adapter[TE].scaling.formula == "alpha/sqrt(r)"
    assert "alpha_pattern" in adapter[K].scaling.origin
    assert adapter[Q].scaling.origin == KEY
    assert codes(adapter) == []


def test_the_header_against_the_tensors() -> None:
    adapter = diffusers.read(valued(stored(pair(Q, 3), SAID), f"{Q}.alpha", np.float32(1)))
    assert codes(adapter) == ["rank-disagrees", "alpha-twice"]
    assert [finding.level for finding in adapter.findings] == ["error", "warning"]
    assert adapter[Q].scale == 3.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ('{"unet.r": 0}', "rank r is 0"),
        ('{"unet.lora_alpha": NaN}', "alpha lora_alpha is nan"),
        ('{"unet.rank_pattern": {"(": 1}}', "not a regular expression"),
        ('{"unet\\u001b[2J.r": 2}', "control characters"),
    ],
)
def test_a_broken_header(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        diffusers.read(replace(stored(pair(Q)), metadata={KEY: text}))
    assert caught.value.where[0] == KEY


def test_ai_toolkit_folds_alpha_and_that_is_said() -> None:
    source = replace(stored(pair("transformer.x.to_q")), metadata={"software": '{"name": "ai-toolkit"}'})
    adapter = diffusers.read(source)
    assert codes(adapter) == ["alpha-folded"]
    assert adapter.findings[0].level == "note"
    assert codes(diffusers.read(valued(source, "transformer.x.to_q.alpha", np.float32(1)))) == []


# --- what is no pair ---


def test_roles() -> None:
    shapes = {
        **pair(Q), f"{Q}.lora_magnitude_vector": (6,), f"{Q}.lora_B.bias": (6,), **pair(K), f"{K}.magnitude": (6,),
        "unet.norm_q.weight": (4,), "unet.y.lora_magnitude_vector": (3,),
    }  # fmt: skip
    adapter = diffusers.read(stored(shapes))
    assert {key: (one.role, one.module) for key, one in adapter.extra.items()} == {
        f"{Q}.lora_magnitude_vector": ("magnitude", Q),
        f"{Q}.lora_B.bias": ("lora_bias", Q),
        f"{K}.magnitude": ("magnitude", K),
        "unet.norm_q.weight": ("other", "unet.norm_q"),
        "unet.y.lora_magnitude_vector": ("other", "unet.y"),
    }
    assert codes(adapter) == ["use-dora", "tensor-unread"]
    assert "2 modules are DoRA" in adapter.findings[0].text
    assert_same_file(write(adapter), stored(shapes))


def test_dora_without_magnitudes_has_the_lengths_of_the_base() -> None:
    said = {"unet.r": 2, "unet.lora_alpha": 4, "unet.use_dora": True, "unet.target_modules": ["to_q", "to_k"]}
    shapes = {**pair(Q), **pair(K), f"{Q}.lora_magnitude_vector": (3,)}
    adapter = diffusers.read(stored(shapes, said))
    assert {one.module: one.role for one in adapter.extra.values()} == {Q: "magnitude", K: "norms"}
    assert "dora-magnitudes-missing" in codes(adapter)
    assert codes(adapter).count("use-dora") == 1
    assert_same_file(write(adapter), stored(shapes, said))
    plain = diffusers.read(stored(shapes, {**said, "unet.use_dora": False}))
    assert {one.role for one in plain.extra.values()} == {"magnitude"}


# --- whose file it is ---


def test_a_peft_configuration_beside_them_makes_such_keys_peft_s() -> None:
    config = {"peft_type": "LORA", "r": 2}
    assert diffusers.detect(stored(pair("transformer.x.to_q")))
    assert not diffusers.detect(stored(pair("transformer.x.to_q"), config=config))
    assert diffusers.detect(stored(pair("transformer.x.to_q"), SAID, config=config))


# --- writing ---


@pytest.mark.parametrize(
    ("modules", "headed"),
    [
        ({Q: low_rank(), TE: low_rank(r=3)}, False),  # ranks may differ between components
        ({Q: low_rank(), K: low_rank(r=3)}, True),
        ({Q: low_rank(0.5), K: low_rank()}, True),
        ({"model.layers.0.q_proj": low_rank()}, True),  # no component: nobody would know the file without
        ({"transformer.h.0.attn.c_attn": low_rank()}, True),
    ],
)
def test_a_header_only_where_it_is_needed(modules: dict[str, LowRank], *, headed: bool) -> None:
    source = write(Adapter(modules=modules, format="peft"))
    assert (KEY in (source.metadata or {})) == headed
    assert diffusers.detect(source)
    assert not comfyui.detect(source)
    back = diffusers.read(source)
    assert {name: m.scale for name, m in back.items()} == {in_pipeline(name): m.scale for name, m in modules.items()}


@pytest.mark.parametrize(
    ("kind", "shape", "key", "written"),
    [
        (Layout(), (6, 1), f"{Q}.lora_magnitude_vector", (6,)),
        (Layout("conv", kernel=(2, 2)), (6,), f"{Q}.lora_magnitude_vector", (1, 6, 1, 1)),
    ],
)
def test_magnitudes_are_translated(kind: Layout, shape: Any, key: str, written: Any) -> None:
    m = number(shape)
    adapter = Adapter(
        modules={Q: low_rank(layout=kind)}, extra={"x": Extra("magnitude", Q, LazyArray.of(m))}, format="lycoris"
    )
    source = write(adapter)
    np.testing.assert_array_equal(source.tensors[key].read(), m.reshape(written))
    assert diffusers.read(source).extra[key].role == "magnitude"


REFUSED = {
    "role": (Extra("norm", Q, LazyArray.of(number((6,)))), FormatError, r"no place for x \(norm\)"),
    "input side": (Extra("magnitude_in", Q, LazyArray.of(number((4,)))), FormatError, "no place for"),
    "no module": (Extra("magnitude", K, LazyArray.of(number((6,)))), FormatError, "does not contain its module"),
    "size": (Extra("magnitude", Q, LazyArray.of(number((5,)))), ShapeError, "not one number for each of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_extras_that_cannot_be_held(case: str) -> None:
    extra, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        write(Adapter(modules={Q: low_rank()}, extra={"x": extra}, format="lycoris"))


def test_modules_that_have_no_place() -> None:
    def one(module: Any, name: str = Q) -> Adapter:
        return Adapter(modules={name: module}, format="peft")

    with pytest.raises(FormatError, match="of kind 'experts'"):
        write(one(low_rank(layout=Layout("experts")), "model.experts[0]"))
    with pytest.raises(MismatchError, match="no factors"):
        write(one(Structured(Dense(LazyArray.of(number((6, 4)))))))
    with pytest.raises(FormatError, match="could not be read back from a diffusers file"):
        write(one(low_rank(), ""))


# --- anything at all ---


PARTS = st.sampled_from(
    ["unet", "text_encoder", "text_model", "text_model.a", "a", "proj_out", "0", "é", "[3]", "to_out", "^x$"]
)


@pytest.mark.slow
@fuzz
@given(
    st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=5, unique=True),
    st.lists(st.floats(-1e30, 1e30, allow_subnormal=False), min_size=5, max_size=5),
    st.lists(st.integers(1, 3), min_size=5, max_size=5),
)
def test_what_is_written_is_read_back(names: list[str], scales: list[float], ranks: list[int]) -> None:
    assume(not any("text_model.text_model" in name for name in names))  # no model has it, and writing refuses it
    assume(len({bool(component(name)) for name in names}) == 1)  # of two kinds, a pipeline would load one
    modules = {name: low_rank(scales[i], r=ranks[i], seed=i) for i, name in enumerate(names)}
    source = write(Adapter(modules=modules, format="peft"))
    back = diffusers.read(source)
    assert set(back) == set(modules)
    assert "rank-disagrees" not in codes(back)
    for name, module in modules.items():
        np.testing.assert_array_equal(back[name].B, module.B)
        assert back[name].scale == pytest.approx(module.scale, rel=1e-15)
