"""ComfyUI's names: what such files say, what is written for them, and what must not be read or written."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from loralens import Adapter, FormatError, LowRank, MismatchError
from loralens.core import Extra, Layout, LazyArray
from tests import models
from tests.formats.dialects import FORM
from tests.formats.stores import assert_same_file, codes, number, numbered, valued

comfyui = FORM["comfyui"]
diffusers = FORM["diffusers"]
write = FORM["comfyui"].write

Q = "diffusion_model.blocks.0.self_attn.q"
K = "diffusion_model.blocks.0.self_attn.k"
FLOAT32 = {"rtol": 1e-6, "atol": 0.0}  # of a scale that went through a float32 α
Shapes = Mapping[str, tuple[int, ...]]


def pair(name: str = Q, r: int = 2, *, A: str = "lora_down.weight", B: str = "lora_up.weight") -> Shapes:
    return {f"{name}.{A}": (r, 4), f"{name}.{B}": (6, r)}


def low_rank(scale: float = 1.0, *, r: int = 2, **more: Any) -> LowRank:
    return models.low_rank(6, 4, r, scale, **more)


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


def test_diffusers_word_in_the_header_wins() -> None:
    source = numbered(pair(A="lora_A.weight", B="lora_B.weight"), metadata={"lora_adapter_metadata": '{"r": 2}'})
    assert diffusers.detect(source)
    assert not comfyui.detect(source)


# --- writing ---


UNET = "mid_block.attentions.0.transformer_blocks.0"
CLIP = "encoder.layers.0.self_attn.q_proj"
WRITTEN = {
    "transformer.blocks.0.to_q": "transformer.blocks.0.to_q",
    f"unet.{UNET}.attn1.to_out.0": f"unet.{UNET}.attn1.processor.to_out",
    f"unet.{UNET}.ff.net.0.proj": f"unet.{UNET}.ff.net.0.proj",
    f"{UNET}.attn2.to_v": f"unet.{UNET}.attn2.processor.to_v",  # a UNet's folder alone
    "transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",  # FLUX, SD3
    "single_transformer_blocks.3.proj_mlp": "transformer.single_transformer_blocks.3.proj_mlp",
    "transformer_blocks.0.attn1.to_q": "diffusion_model.transformer_blocks.0.attn1.to_q",  # LTX
    f"text_encoder.text_model.{CLIP}": f"text_encoder.text_model.{CLIP}",
    f"text_encoder.{CLIP}": f"text_encoder.text_model.{CLIP}",  # as transformers 5 calls it
    "text_encoder_2.encoder.block.0.q": "text_encoders.t5xxl.transformer.encoder.block.0.q",
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


def test_extras_of_another_dialect() -> None:
    bias, m = number((6,)), number((4,))
    extra = {"b": Extra("lora_bias", Q, LazyArray.of(bias)), "m": Extra("magnitude_in", Q, LazyArray.of(m))}
    source = write(adapter(Q, scale=0.3, extra=extra))
    np.testing.assert_allclose(source.tensors[f"{Q}.diff_b"].read(), 0.3 * bias.astype(float), **FLOAT32)
    np.testing.assert_array_equal(source.tensors[f"{Q}.dora_scale"].read(), m[None])
    assert {one.role for one in comfyui.read(source).extra.values()} == {"diff_b", "magnitude_in"}


REFUSED = {
    "output side": (Extra("magnitude", Q, LazyArray.of(number((6,)))), FormatError, "no place for"),
    "no module": (Extra("lora_bias", K, LazyArray.of(number((6,)))), FormatError, "does not contain its module"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_extras_that_cannot_be_held(case: str) -> None:
    extra, kind, message = REFUSED[case]
    with pytest.raises(kind, match=message):
        write(adapter(Q, extra={"x": extra}))
