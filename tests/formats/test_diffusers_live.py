"""diffusers itself as the judge: what it saves we read as PEFT computes it, and what we write changes a model exactly.

Models are made here, tiny, random and in float64. Every test also asserts that the adapter changes the output: with a
wrong prefix diffusers loads nothing and says nothing. Files are given by ``weight_name``: for a bare path diffusers
goes another way, on which it does not look at the header, and every scale is 1.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.core import Extra, Layout, LazyArray
from loralens.formats import Stored
from tests.formats.dialects import FORM
from tests.formats.files import KEY, write_safetensors
from tests.models import low_rank
from tests.tolerances import LIVE_OUTPUT, MOVED, PEFT_UPDATE

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from tests.conformance import make_diffusers as made  # noqa: E402

diffusers_writer = FORM["diffusers"]

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quiet_torch")]
FILE = "pytorch_lora_weights.safetensors"
ATTN = f"unet.{made.ATTN}"
TEXT = "text_encoder.text_model.encoder.layers.0"
FLUX = "transformer.transformer_blocks.0"
SHAPES = {  # name → out, in, kernel
    f"{ATTN}.to_q": (8, 8, ()),
    f"{ATTN}.to_k": (8, 6, ()),
    f"{ATTN}.to_out.0": (8, 8, ()),
    "unet.conv_in": (8, 2, (3, 3)),
    "unet.down_blocks.0.attentions.0.proj_in": (8, 8, (1, 1)),
    f"{TEXT}.self_attn.q_proj": (6, 6, ()),
    f"{TEXT}.mlp.fc1": (8, 6, ()),
    f"{FLUX}.attn.to_q": (8, 8, ()),
    f"{FLUX}.ff.net.0.proj": (32, 8, ()),
    "transformer.single_transformer_blocks.0.proj_out": (8, 40, ()),
    "transformer.proj_out": (4, 8, ()),  # whose name ends the one above: patterns must tell them apart
}


@pytest.fixture(autouse=True)
def no_version_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 5.24 wants a PEFT that is not released before it loads an adapter; the loading itself works."""
    integration = pytest.importorskip("transformers.integrations.peft")
    monkeypatch.setattr(integration, "check_peft_version", lambda *_, **__: None)


def module(name: str, rank: int, scale: float) -> LowRank:
    out, in_, kernel = SHAPES[name]
    layout = Layout("conv", kernel=kernel) if kernel else None
    return low_rank(out, in_ * int(np.prod(kernel)), rank, scale, seed=len(name), layout=layout)


def adapter(part: str, ranks: tuple[int, ...], scales: tuple[float, ...], **more: Any) -> Adapter:
    """An adapter from another dialect for the modules of one component."""
    names = [name for name in SHAPES if name.startswith(f"{part}.")]
    modules = {name: module(name, ranks[i % len(ranks)], scales[i % len(scales)]) for i, name in enumerate(names)}
    return Adapter(modules=modules, format="peft", **more)


def written(source: Adapter, folder: Path) -> Stored:
    stored = diffusers_writer.write(source)
    folder.mkdir(exist_ok=True)
    write_safetensors(stored, folder / FILE)
    return stored


def answer(model: Any) -> Any:
    """The output of a model on fixed inputs, float64."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    kind = type(model).__name__
    with torch.no_grad():
        if kind == "UNet2DConditionModel":
            return model(draw(2, 2, 4, 4), torch.tensor([3, 7]), draw(2, 3, 6)).sample
        if kind == "FluxTransformer2DModel":
            return model(
                hidden_states=draw(1, 4, 4), encoder_hidden_states=draw(1, 3, 6), pooled_projections=draw(1, 6),
                timestep=torch.tensor([0.5]).double(), img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(3, 3),
            ).sample  # fmt: skip
        return model(torch.tensor([[0, 3, 4, 5, 1]])).last_hidden_state


def by_hand(model: Any, source: Adapter, part: str, weight: Callable[[str, Any], Any] | None = None) -> Any:
    """A copy of a model with ΔW (or what ``weight`` makes of W) added to its weights."""
    model, prefix = copy.deepcopy(model), f"{part}." if part else ""
    for name, one in source.items():
        path = name.removeprefix(prefix).removeprefix("text_model.") + ".weight"
        if name.startswith(prefix):
            parameter = model.get_parameter(path)
            W = parameter.detach().numpy()
            new = weight(name, W) if weight else W + one.dense().reshape(W.shape)
            parameter.data.copy_(torch.from_numpy(new))
    return model


def assert_same_output(found: Any, expected: Any, base: Any) -> None:
    assert (answer(expected) - answer(base)).abs().max() > MOVED
    np.testing.assert_allclose(answer(found), answer(expected), **PEFT_UPDATE)


CASES = {  # ranks, scales, whether the header has to say them
    "scale one": ((2,), (1.0,), False),
    "ranks differ": ((2, 3), (1.0,), True),
    "all differ": ((1, 3, 2), (1 / 3, -2.0, 0.7), True),
}
MODELS = {"unet": made.unet, "transformer": made.flux}


@pytest.mark.some(2)
@pytest.mark.parametrize("part", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_what_we_write_changes_a_model_by_exactly_its_update(case: str, part: str, tmp_path: Path) -> None:
    ranks, scales, headed = CASES[case]
    source = adapter(part, ranks, scales)
    assert (KEY in (written(source, tmp_path).metadata or {})) == headed
    model = MODELS[part]()
    base = copy.deepcopy(model)
    model.load_lora_adapter(tmp_path, weight_name=FILE, prefix=part)
    assert_same_output(model, by_hand(base, source, part), base)


def test_a_pipeline_loads_both_components(tmp_path: Path) -> None:
    both = [adapter("unet", (2,), (1.0,)), adapter("text_encoder", (2, 3), (0.7, -2.0))]
    modules = {name: one for source in both for name, one in source.items()}
    source = Adapter(modules=modules, format="kohya")
    written(source, tmp_path)
    pipe = made.pipeline()
    unet, text = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.text_encoder)
    pipe.load_lora_weights(tmp_path)
    assert_same_output(pipe.unet, by_hand(unet, source, "unet"), unet)
    assert_same_output(pipe.text_encoder, by_hand(text, source, "text_encoder"), text)


def test_magnitudes_and_biases_of_another_dialect(tmp_path: Path) -> None:
    """DoRA: W' = m/‖W + ΔW‖ · (W + ΔW) by output, for linear layers and convolutions."""
    source = adapter("unet", (2,), (1.5,))
    rng = np.random.default_rng(4)
    m = {name: rng.uniform(0.5, 2, one.shape[0]) for name, one in source.items()}
    extra = {f"x.{name}": Extra("magnitude", name, LazyArray.of(m[name].reshape(-1, 1))) for name in source}
    source = Adapter(modules=source.modules, extra=extra, format="lycoris")
    written(source, tmp_path)
    model = made.unet()
    base = copy.deepcopy(model)
    model.load_lora_adapter(tmp_path, weight_name=FILE, prefix="unet")

    def dora(name: str, W: Any) -> Any:
        moved = W + source[name].dense().reshape(W.shape)
        norm = np.sqrt((moved**2).sum(axis=tuple(range(1, W.ndim)), keepdims=True))
        return m[name].reshape(norm.shape) / norm * moved

    assert_same_output(model, by_hand(base, source, "unet", dora), base)


def sd3() -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12,
        caption_projection_dim=16, pooled_projection_dim=8, out_channels=4,
    )  # fmt: skip


@pytest.mark.parametrize("make", [sd3, made.flux])
def test_a_pipeline_loads_every_layer_of_a_folder_of_peft(make: Callable[[], Any], tmp_path: Path) -> None:
    """PEFT's names have no component, and a pipeline loads only what is under ``transformer.``."""
    from diffusers.loaders.lora_pipeline import SD3LoraLoaderMixin
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(make().float(), config).save_pretrained(tmp_path / "peft")
    source = loralens.load(tmp_path / "peft")
    loralens.convert(tmp_path / "peft", to="diffusers", output=tmp_path / FILE)
    # Its two functions are those of all pipelines with a transformer, for a file in diffusers' own names.
    tensors, header = SD3LoraLoaderMixin.lora_state_dict(str(tmp_path), weight_name=FILE, return_lora_metadata=True)
    model = make().float()
    SD3LoraLoaderMixin.load_lora_into_transformer(tensors, transformer=model, metadata=header)
    loaded = {name: layer for name, layer in model.named_modules() if getattr(layer, "lora_A", None)}
    assert loaded.keys() == source.modules.keys()
    for name, layer in loaded.items():
        np.testing.assert_allclose(layer.get_delta_weight("default_0").detach(), source[name].dense(), **LIVE_OUTPUT)
