"""ComfyUI's names: what such files say, what is written for them, and what must not be read or written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import loralens
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling
from loralens.core.structured import Dense, Structured
from loralens.errors import FormatError, LoraLensError, MismatchError, ShapeError
from loralens.formats.dialects import lycoris
from loralens.formats.dialects.comfyui import reader as comfyui
from loralens.formats.dialects.comfyui.writer import write
from loralens.formats.dialects.diffusers import reader as diffusers
from loralens.formats.dialects.kohya import reader as kohya
from loralens.formats.dialects.peft import reader as peft
from loralens.formats.files.container import Stored, read_safetensors
from tests.formats.stores import assert_same_file, codes, number, numbered, valued
from tests.formats.test_fuzz import read_everything
from tests.marks import examples
from tests.tolerances import SAME_UPDATE

CONFORMANCE = Path(__file__).parent.parent / "conformance"
CASES = sorted(folder.name for folder in CONFORMANCE.glob("comfyui-*"))
Q = "diffusion_model.blocks.0.self_attn.q"
K = "diffusion_model.blocks.0.self_attn.k"
FLOAT32 = {"rtol": 1e-6, "atol": 0.0}  # of a scale that went through a float32 α
Shapes = Mapping[str, tuple[int, ...]]
fuzz = examples(150, suppress_health_check=[HealthCheck.too_slow])


def pair(name: str = Q, r: int = 2, *, A: str = "lora_down.weight", B: str = "lora_up.weight") -> Shapes:
    return {f"{name}.{A}": (r, 4), f"{name}.{B}": (6, r)}


def low_rank(scale: float = 1.0, *, r: int = 2, layout: Layout | None = None, seed: int = 0, **more: Any) -> LowRank:
    return LowRank(number((6, r), seed), number((r, 4), seed + 1), scale, layout=layout, **more)


def adapter(*names: str, scale: float = 1.0, **more: Any) -> Adapter:
    modules = {name: low_rank(scale, seed=i) for i, name in enumerate(names)}
    return Adapter(modules=modules, **{"format": "peft", **more})


# --- what a file says ---

STYLES = {
    "up and down": ("lora_down.weight", "lora_up.weight"),
    "A and B": ("lora_A.weight", "lora_B.weight"),
    "an adapter's name": ("lora_A.default.weight", "lora_B.default.weight"),
    "mochi": ("lora_A", "lora_B"),
    "layer": ("lora.down.weight", "lora.up.weight"),
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [None, 3.0, 0.0])
def test_every_style_and_its_scale(style: str, alpha: float | None) -> None:
    A, B = STYLES[style]
    source = numbered(pair(A=A, B=B))
    if alpha is not None:
        source = valued(source, f"{Q}.alpha", np.float16(alpha))
    assert comfyui.detect(source)
    module = comfyui.read(source)[Q]
    assert module.scale == (1.0 if alpha is None else alpha / 2)
    assert module.scaling.formula == ("given" if alpha is None else "alpha/r")
    np.testing.assert_array_equal(module.B, source.tensors[f"{Q}.{B}"].read())
    assert_same_file(write(comfyui.read(source)), source)


def test_alpha_in_some_modules_only_is_a_warning() -> None:
    read = comfyui.read(valued(numbered({**pair(Q), **pair(K)}), f"{Q}.alpha", np.float32(3)))
    assert (read[Q].scale, read[K].scale) == (1.5, 1.0)
    assert codes(read) == ["alpha-missing"]


@pytest.mark.parametrize("bad", [np.float32([1, 2]), np.float32(np.nan), np.True_, np.complex64(1)])
def test_an_alpha_that_is_no_number(bad: Any) -> None:
    with pytest.raises(LoraLensError, match="alpha") as caught:
        comfyui.read(valued(numbered(pair()), f"{Q}.alpha", bad))
    assert caught.value.where == (Q,)


def test_ai_toolkit_is_named() -> None:
    source = numbered(pair(A="lora_A.weight", B="lora_B.weight"), metadata={"software": '{"name": "ai-toolkit"}'})
    assert codes(comfyui.read(source)) == ["alpha-folded"]


NAMES = {
    "unet.mid_block.attn1.processor.to_q": "unet.mid_block.attn1.to_q",
    "unet.mid_block.attn1.processor.to_out": "unet.mid_block.attn1.to_out.0",
    "unet.mid_block.proj_in": "unet.mid_block.proj_in",
    "text_encoder.x.processor.to_q": "text_encoder.x.processor.to_q",
    "text_encoders.clip_l.transformer.x": "text_encoders.clip_l.transformer.x",
    "blocks.0.q": "blocks.0.q",
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    source = numbered(pair(name))
    assert comfyui.detect(source)
    assert list(comfyui.read(source)) == [NAMES[name]]


def test_roles_and_what_is_said_about_them() -> None:
    shapes = {
        **pair(Q), f"{Q}.diff_b": (6,), f"{Q}.reshape_weight": (2,), "diffusion_model.norm.diff": (6,),
        "diffusion_model.img_in.set_weight": (6, 4), f"{Q}.magnitude": (6,), "diffusion_model.x.what": (1,),
        "diffusion_model.y.alpha": (),
    }  # fmt: skip
    read = comfyui.read(numbered(shapes))
    assert {key.rpartition(".")[2]: one.role for key, one in read.extra.items()} == {
        "diff_b": "diff_b", "reshape_weight": "shape", "diff": "diff", "set_weight": "saved",
        "magnitude": "magnitude", "what": "other", "alpha": "other",
    }  # fmt: skip
    assert {one.module for one in read.extra.values()} == {
        Q, "diffusion_model.norm", "diffusion_model.img_in", "diffusion_model.x", "diffusion_model.y",
    }  # fmt: skip
    assert codes(read) == [
        "full-difference", "bias-difference", "set-weight", "reshape-weight", "use-dora", "tensor-unread"
    ]  # fmt: skip
    assert {finding.level for finding in read.findings} == {"note"}
    assert_same_file(write(read), numbered(shapes))


def test_a_difference_takes_the_place_of_a_pair() -> None:
    assert "pair-ignored" in codes(comfyui.read(numbered({**pair(Q), f"{Q}.diff": (6, 4)})))


@pytest.mark.parametrize(("shape", "role"), [((6, 1), "magnitude"), ((6,), "magnitude"), ((1, 4), "magnitude_in")])
def test_the_axis_of_dora(shape: tuple[int, ...], role: str) -> None:
    source = numbered({**pair(), f"{Q}.dora_scale": shape})
    assert comfyui.detect(source)
    assert comfyui.read(source).extra[f"{Q}.dora_scale"].role == role


BROKEN = {
    "half": ({f"{Q}.lora_down.weight": (2, 4)}, FormatError, "has no B beside it"),
    "empty": ({f"{Q}.lora_down.weight": (0, 4), f"{Q}.lora_up.weight": (6, 0)}, ShapeError, "are not a pair"),
    "rank": ({f"{Q}.lora_down.weight": (2, 4), f"{Q}.lora_up.weight": (6, 3)}, ShapeError, "do not multiply"),
    "flat": ({f"{Q}.lora_down.weight": (2,), f"{Q}.lora_up.weight": (6, 2)}, ShapeError, "are not a pair"),
    "twice": ({**pair(Q), f"{Q}.lora_A.weight": (2, 4)}, FormatError, "are the same tensor"),
    "dora": ({**pair(Q), f"{Q}.dora_scale": (5,)}, ShapeError, "fits neither side"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_said_with_its_place(case: str) -> None:
    shapes, kind, message = BROKEN[case]
    with pytest.raises(kind, match=message):
        comfyui.read(numbered(shapes))


FOREIGN = {
    "peft": pair("base_model.model.diffusion_model.x", A="lora_A.weight", B="lora_B.weight"),
    "diffusers": pair("transformer.x.y", A="lora_A.weight", B="lora_B.weight"),
    "mixed": {**pair(Q, A="lora_A.weight", B="lora_B.weight"), **pair("x.y", A="lora_A.weight", B="lora_B.weight")},
    "kohya": pair("lora_unet_x"),
    "kohya with dots": pair("lora_unet_x.y"),
    "kohya glued": pair("lora_unet_x", A="lora_down.weight", B="lora_up.weight"),
    "no dots": pair("x"),
    "loralib": pair("roberta.x", A="lora_A", B="lora_B"),
    "lycoris": {f"{Q}.hada_w1_a": (6, 2), **pair(K)},
    "tucker": {**pair(Q), f"{Q}.lora_mid.weight": (2, 2, 3, 3)},
    "xlabs": pair("diffusion_model.double_blocks.0.processor", A="qkv_lora1.down.weight", B="qkv_lora1.up.weight"),
    "a difference alone": {f"{Q}.diff": (6, 4)},
    "nothing": {},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_files_of_others(case: str) -> None:
    assert not comfyui.detect(numbered(FOREIGN[case]))


@pytest.mark.parametrize("case", CASES)
def test_nobody_else_takes_these_files(case: str) -> None:
    source = read_safetensors(CONFORMANCE / case / "lora.safetensors")
    assert comfyui.detect(source)
    assert not any(form.detect(source) for form in (peft, kohya, lycoris, diffusers))


def test_diffusers_word_in_the_header_wins() -> None:
    source = numbered(pair(A="lora_A.weight", B="lora_B.weight"), metadata={"lora_adapter_metadata": '{"r": 2}'})
    assert diffusers.detect(source)
    assert not comfyui.detect(source)


# --- writing ---


@pytest.mark.parametrize("case", CASES)
def test_written_back_to_the_bit(case: str) -> None:
    source = read_safetensors(CONFORMANCE / case / "lora.safetensors")
    assert_same_file(write(comfyui.read(source)), source)


@pytest.mark.parametrize("case", CASES)
def test_a_new_scale_changes_alpha_alone(case: str) -> None:
    source = read_safetensors(CONFORMANCE / case / "lora.safetensors")
    read = comfyui.read(source)
    turned = write(read.map(lambda m: m.rescaled(-2 * m.scale, Scaling("given", origin="test"))))
    for key, tensor in source.tensors.items():
        if not key.endswith(".alpha"):
            assert turned.tensors[key].read().tobytes() == tensor.read().tobytes()
    alphas = {key: tensor for key, tensor in turned.tensors.items() if key.endswith(".alpha")}
    assert len(alphas) == len(read)
    assert {(tensor.shape, str(tensor.dtype)) for tensor in alphas.values()} == {((), "float32")}
    back = comfyui.read(turned)
    for name, module in read.items():
        assert back[name].scale == pytest.approx(-2 * module.scale, rel=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_changed_factors(case: str) -> None:
    read = comfyui.read(read_safetensors(CONFORMANCE / case / "lora.safetensors"))
    less = read.map(lambda m: LowRank(m.B[:, :1], m.A[:1], m.scale, layout=m.layout))
    source = write(less)
    assert comfyui.detect(source)
    back = comfyui.read(source)
    assert set(back) == set(read)
    for name, module in less.items():
        assert back[name].layout == module.layout
        np.testing.assert_allclose(back[name].dense(), module.dense(), **FLOAT32)


UNET = "mid_block.attentions.0.transformer_blocks.0"
CLIP = "encoder.layers.0.self_attn.q_proj"
WRITTEN = {
    "transformer.blocks.0.to_q": "transformer.blocks.0.to_q",
    f"unet.{UNET}.attn1.to_q": f"unet.{UNET}.attn1.processor.to_q",
    f"unet.{UNET}.attn1.to_out.0": f"unet.{UNET}.attn1.processor.to_out",
    f"unet.{UNET}.ff.net.0.proj": f"unet.{UNET}.ff.net.0.proj",
    f"{UNET}.attn2.to_v": f"unet.{UNET}.attn2.processor.to_v",  # a UNet's folder alone
    "conv_in": "unet.conv_in",
    "transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",  # FLUX, SD3
    "single_transformer_blocks.3.proj_mlp": "transformer.single_transformer_blocks.3.proj_mlp",
    "transformer_blocks.0.attn1.to_q": "diffusion_model.transformer_blocks.0.attn1.to_q",  # LTX
    f"text_encoder.text_model.{CLIP}": f"text_encoder.text_model.{CLIP}",
    f"text_encoder.{CLIP}": f"text_encoder.text_model.{CLIP}",  # as transformers 5 calls it
    f"text_encoder_2.{CLIP}": f"text_encoder_2.text_model.{CLIP}",
    "text_encoder_2.encoder.block.0.q": "text_encoders.t5xxl.transformer.encoder.block.0.q",
    "text_encoder_3.encoder.block.0.q": "text_encoders.t5xxl.transformer.encoder.block.0.q",
    "diffusion_model.x": "diffusion_model.x",
    "double_blocks.0.img_attn.qkv": "diffusion_model.double_blocks.0.img_attn.qkv",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_comfyui_calls_a_module(name: str) -> None:
    source = write(adapter(name, scale=0.25))
    file = WRITTEN[name]
    assert sorted(source.tensors) == [f"{file}.{leaf}" for leaf in ("alpha", "lora_down.weight", "lora_up.weight")]
    assert source.tensors[f"{file}.alpha"].read() == np.float32(0.5)
    assert comfyui.detect(source)
    (found,) = comfyui.read(source)
    assert source.names.get(found, found) == name


def test_bfloat16_keeps_its_factors_and_alpha_its_own_dtype() -> None:
    module = LowRank(number((6, 24), 1, ml_dtypes.bfloat16), number((24, 4), 2, ml_dtypes.bfloat16), 7 / 24)
    back = comfyui.read(write(Adapter(modules={Q: module}, format="peft")))[Q]
    assert back.scale == 7 / 24
    assert back.B.tobytes() == module.B.tobytes()


@pytest.mark.parametrize("scale", [1e39, -1e300, 1e-60])
def test_a_scale_without_alpha_is_refused(scale: float) -> None:
    with pytest.raises(FormatError, match="has no α in float32"):
        write(adapter(Q, scale=scale))


def test_a_scale_of_zero() -> None:
    assert comfyui.read(write(adapter(Q, scale=0.0)))[Q].scale == 0


def test_two_modules_of_one_name() -> None:
    with pytest.raises(FormatError, match=r"would be called diffusion_model\.x too"):
        write(adapter("x", "diffusion_model.x"))


def test_modules_that_have_no_place() -> None:
    def one(module: Any, name: str = Q) -> Adapter:
        return Adapter(modules={name: module}, format="peft")

    with pytest.raises(FormatError, match="of kind 'embedding'"):
        write(one(low_rank(layout=Layout("embedding"))))
    with pytest.raises(MismatchError, match="underscores for dots"):
        write(one(low_rank(), "lora_unet_x"))
    with pytest.raises(MismatchError, match="no factors"):
        write(one(Structured(Dense(LazyArray.of(number((6, 4)))))))
    with pytest.raises(ShapeError, match="grouped convolution"):
        write(one(low_rank(layout=Layout("conv", kernel=(1, 1), groups=2))))


def test_extras_of_another_dialect() -> None:
    bias, m = number((6,)), number((4,))
    extra = {"b": Extra("lora_bias", Q, LazyArray.of(bias)), "m": Extra("magnitude_in", Q, LazyArray.of(m))}
    source = write(adapter(Q, scale=0.3, extra=extra))
    np.testing.assert_allclose(source.tensors[f"{Q}.diff_b"].read(), 0.3 * bias.astype(float), **FLOAT32)
    np.testing.assert_array_equal(source.tensors[f"{Q}.dora_scale"].read(), m[None])
    assert {one.role for one in comfyui.read(source).extra.values()} == {"diff_b", "magnitude_in"}


REFUSED = {
    "role": (Extra("norm", Q, LazyArray.of(number((6,)))), FormatError, r"no place for x \(norm\)"),
    "output side": (Extra("magnitude", Q, LazyArray.of(number((6,)))), FormatError, "no place for"),
    "no module": (Extra("lora_bias", K, LazyArray.of(number((6,)))), FormatError, "does not contain its module"),
    "size": (Extra("lora_bias", Q, LazyArray.of(number((5,)))), ShapeError, "not one number for each of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_extras_that_cannot_be_held(case: str) -> None:
    extra, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        write(adapter(Q, extra={"x": extra}))


# --- anything at all ---

ANY_NAME = st.sampled_from([Q, K, "unet.a.processor.to_out", "text_encoders.x", "lora_unet_a", "x", ""])
LEAVES = st.sampled_from([
    "lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight", "lora_A", "lora_B", "alpha", "diff",
    "diff_b", "set_weight", "reshape_weight", "dora_scale", "magnitude", "weight", "lora.up.weight",
])  # fmt: skip
DTYPES = st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.bool_, np.complex64])


@st.composite
def surgery(draw: Any) -> Stored:
    """A sound pair, and any tensors besides or instead."""
    r, kernel = draw(st.integers(1, 3)), draw(st.sampled_from([[], [1, 1], [3]]))
    name = draw(ANY_NAME)
    tensors = {
        f"{name}.lora_down.weight": (np.float32, [r, 2, *kernel]),
        f"{name}.lora_up.weight": (np.float32, [3, r, *(1 for _ in kernel)]),
    }
    keys = st.builds("{}.{}".format, ANY_NAME, LEAVES)
    shapes = st.lists(st.integers(0, 4), max_size=4)
    tensors |= draw(st.dictionaries(keys, st.tuples(DTYPES, shapes), max_size=4))
    for key in draw(st.sets(st.sampled_from(list(tensors)), max_size=1)):
        del tensors[key]
    value = draw(st.sampled_from([1, 0, -2, 1e30, np.nan, np.inf]))
    with np.errstate(all="ignore"):
        return Stored({k: LazyArray.of(np.full(shape, value).astype(d)) for k, (d, shape) in tensors.items()})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@fuzz
@given(surgery())
def test_any_tensors_give_an_adapter_or_an_error_of_ours(source: Stored) -> None:
    comfyui.detect(source)
    try:
        read = comfyui.read(source)
        read_everything(read)
        assert_same_file(write(read), source)
    except LoraLensError:
        return


PARTS = st.sampled_from(["unet", "text_encoder_3", "a", "0", "to_out", "to_q", "é", "diffusion_model", "processor"])


@fuzz
@given(
    st.lists(st.lists(PARTS, min_size=1, max_size=4).map(".".join), min_size=1, max_size=4, unique=True),
    st.floats(-1e30, 1e30),
)
def test_what_is_written_is_read_back(names: list[str], scale: float) -> None:
    made = adapter(*names, scale=scale)
    try:
        source = write(made)
    except FormatError:
        return
    back = comfyui.read(source)
    assert len(back) == len(made)
    for file, module in back.items():
        other = made[source.names.get(file, file)]
        np.testing.assert_array_equal(module.B, other.B)
        assert module.scale == pytest.approx(other.scale, rel=1e-6)


def test_through_the_front_door_names_come_back(tmp_path: Path) -> None:
    if "comfyui" not in {form.name for form in loralens.formats.FORMATS}:
        pytest.skip("not in the table yet")
    made = adapter("model.layers.0.q_proj", "text_encoder_3.x", f"unet.{UNET}.attn1.to_out.0", scale=0.7)
    loralens.save(made, tmp_path / "out.safetensors", format="comfyui")
    back = loralens.load(tmp_path / "out.safetensors")
    assert (back.format, set(back)) == ("comfyui", set(made))
    for name, module in made.items():
        np.testing.assert_allclose(back[name].dense(), module.dense(), **SAME_UPDATE)
