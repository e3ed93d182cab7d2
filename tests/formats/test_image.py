"""Adapters of image models between kohya, diffusers and ComfyUI without a base: names, and ΔW layer by layer.

The real clients read the same names: ComfyUI's ``load_lora``, sd-scripts' ``LoRANetwork`` and diffusers' converters
were run on such files with every layer of every model.
"""

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from loralens import LoraLensError
from loralens.core import Extra, Layout, LazyArray
from loralens.core.image_models import image_models
from tests.models import low_rank

LAYERS = {layer.name: layer for model in image_models() for layer in model.layers}
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.7"
FLUX = [
    *(f"{DOUBLE}.attn.to_{part}" for part in "qkv"),
    f"{DOUBLE}.attn.add_v_proj",  # alone: the rows of q and k are zero
    *(f"{SINGLE}.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")),
    "transformer.norm_out.linear",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
]
UNET = "unet.down_blocks.1.attentions.0"
SDXL = [
    f"{UNET}.transformer_blocks.1.attn2.to_k",
    f"{UNET}.transformer_blocks.1.attn1.to_out.0",
    "unet.down_blocks.1.resnets.0.conv_shortcut",
    "unet.up_blocks.0.upsamplers.0.conv",
    "text_encoder.text_model.encoder.layers.0.mlp.fc1",
]


def adapter(names: list[str], scales: tuple[float, ...] = (0.5,), rank: int = 2) -> loralens.Adapter:
    modules = {}
    for i, name in enumerate(names):
        shape, kernel = LAYERS[name].update_shape, LAYERS[name].shape[2:]
        layout = Layout("conv", kernel=kernel) if kernel else None
        modules[name] = low_rank(*shape, rank, scales[i % len(scales)], seed=i, dtype="f2", layout=layout)
    return loralens.Adapter(modules=modules, format="diffusers")


def bare(path: Path) -> Path:
    """The file as another program would have written it: without what loralens recorded."""
    save_file(load_file(path), path)
    return path


def stems(path: Path) -> set[str]:
    return {key.split(".")[0] for key in load_file(path)}


def applied(module: loralens.LowRank) -> np.ndarray:
    """ΔW times three random vectors: equal if ΔW is, and a thousandth of its numbers."""
    vectors = np.random.default_rng(9).standard_normal((module.shape[1], 3))
    return module.scale * (module.B.astype("f8") @ (module.A.astype("f8") @ vectors))


def check_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * max(np.abs(expected).max(), 1e-9))


def check_same(found: loralens.Adapter, expected: loralens.Adapter) -> None:
    assert set(found) == set(expected)
    for name, module in expected.items():
        check_close(applied(found[name]), applied(module))


@pytest.mark.parametrize("names", [SDXL, FLUX], ids=["SDXL", "FLUX"])
@pytest.mark.parametrize("through", ["kohya", "comfyui"])
def test_there_and_back_without_a_base_and_without_a_record(names: list[str], through: str, tmp_path: Path) -> None:
    original, file = adapter(names), tmp_path / "through.safetensors"
    loralens.convert(original, to=through, output=file)
    back = tmp_path / "back.safetensors"
    loralens.convert(bare(file), to="diffusers", output=back)
    check_same(loralens.load(back), original)
    # No rank is left over from the joined matrices.
    assert {module.rank for module in loralens.load(back).modules.values()} == {2}


def test_matrices_of_flux_are_joined_row_by_row(tmp_path: Path) -> None:
    original = adapter(FLUX)
    loralens.convert(original, to="kohya", output=tmp_path / "flux.safetensors")
    assert {name for name in stems(tmp_path / "flux.safetensors") if "lora_te1" not in name} == {
        "lora_unet_double_blocks_0_img_attn_qkv",
        "lora_unet_double_blocks_0_txt_attn_qkv",
        "lora_unet_single_blocks_7_linear1",
        "lora_unet_single_blocks_7_linear2",
        "lora_unet_final_layer_adaLN_modulation_1",
    }
    tensors = load_file(tmp_path / "flux.safetensors")

    def delta(name: str) -> np.ndarray:
        up, down = (tensors[f"{name}.lora_{half}.weight"].astype("f8") for half in ("up", "down"))
        return applied(loralens.LowRank(up, down, float(tensors[f"{name}.alpha"]) / len(down)))

    qkv = delta("lora_unet_double_blocks_0_img_attn_qkv")
    for i, part in enumerate("qkv"):
        check_close(qkv[3072 * i : 3072 * (i + 1)], applied(original[f"{DOUBLE}.attn.to_{part}"]))
    text = delta("lora_unet_double_blocks_0_txt_attn_qkv")
    assert not text[:6144].any()
    check_close(text[6144:], applied(original[f"{DOUBLE}.attn.add_v_proj"]))
    assert tensors["lora_unet_single_blocks_7_linear1.lora_down.weight"].shape == (8, 3072)
    check_close(delta("lora_unet_single_blocks_7_linear1")[9216:], applied(original[f"{SINGLE}.proj_mlp"]))
    # diffusers has scale before shift, and the original checkpoint shift before scale.
    want = applied(original["transformer.norm_out.linear"])
    check_close(delta("lora_unet_final_layer_adaLN_modulation_1"), np.concatenate([want[3072:], want[:3072]]))


def test_a_shared_A_is_not_repeated(tmp_path: Path) -> None:
    """A matrix that was trained as a whole comes back with its rank, and not with three times it."""
    first = adapter([f"{DOUBLE}.attn.to_q"])
    rng = np.random.default_rng(3)
    B, A = rng.standard_normal((9216, 4)).astype("f4"), first[0].A[:1].repeat(4, axis=0) + rng.random((4, 3072), "f4")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    whole = loralens.Adapter(modules={name: loralens.LowRank(B, A, 0.25)}, format="kohya")
    split = loralens.convert(whole, to="diffusers").adapter
    assert {module.rank for module in split.modules.values()} == {4}
    joined = loralens.convert(split, to="kohya", output=tmp_path / "joined.safetensors").adapter
    assert joined[0].rank == 4
    np.testing.assert_array_equal(joined[0].B, whole[0].B)
    np.testing.assert_array_equal(joined[0].A, whole[0].A)


def test_magnitudes_are_divided_with_the_rows_and_others_are_refused() -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    rng = np.random.default_rng(4)
    pair = loralens.LowRank(rng.random((9216, 2), "f4"), rng.random((2, 3072), "f4"))
    rows, columns = rng.random((9216, 1), "f4"), rng.random((1, 3072), "f4")

    def dora(role: str, tensor: np.ndarray) -> loralens.Adapter:
        extra = {f"{name}.dora_scale": Extra(role, name, LazyArray.of(tensor))}
        return loralens.Adapter(modules={name: pair}, extra=extra, format="kohya")

    split = loralens.convert(dora("magnitude", rows), to="diffusers").adapter
    held = {extra.module: extra.tensor.read() for extra in split.extra.values()}
    for i, part in enumerate("qkv"):
        np.testing.assert_array_equal(held[f"{DOUBLE}.attn.to_{part}"].ravel(), rows.ravel()[3072 * i : 3072 * (i + 1)])
    joined = loralens.convert(split, to="kohya").adapter
    (back,) = joined.extra.values()
    np.testing.assert_array_equal(back.tensor.read(), rows)
    with pytest.raises(LoraLensError, match="not have one number for each of the 9216 rows"):
        loralens.convert(dora("magnitude_in", columns), to="diffusers")


def tiny(*names: str) -> loralens.Adapter:
    """An adapter of PEFT for layers of a shape that no known model has."""
    rng = np.random.default_rng(6)
    return loralens.Adapter(
        modules={name: loralens.LowRank(rng.random((8, 2)), rng.random((2, 8)), 0.5) for name in names}
    )


SD3 = ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.ff.net.2", "proj_out", "time_text_embed.linear_1"]
WAN = [
    "blocks.0.attn1.to_q",
    "blocks.0.ffn.net.2",
    "proj_out",
    "condition_embedder.time_proj",
    "condition_embedder.other",
]


@pytest.mark.parametrize(
    ("names", "to"),
    [
        (SD3, "kohya"),
        (WAN, "kohya"),
        ([f"transformer.{name}" for name in SD3], "kohya"),
        (["diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.other"], "diffusers"),
        (["transformer.proj_out", "layers.0.q"], "diffusers"),
    ],
)
def test_names_of_transformers_that_the_program_has_under_others_are_refused(
    names: list[str], to: str, tmp_path: Path
) -> None:
    with pytest.raises(LoraLensError, match=r"blocks\.0|layers\.0|proj_out"):
        loralens.convert(tiny(*names), to=to, output=tmp_path / "tiny.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.parametrize(("names", "component"), [(SDXL, "unet."), (FLUX, "transformer.")], ids=["SDXL", "FLUX"])
def test_diffusers_reads_the_same_from_kohya(names: list[str], component: str, tmp_path: Path) -> None:
    """Its own converters turn our kohya file into the layers of which that file was made."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.loaders import lora_conversion_utils as converters

    # Of norm_out, diffusers 0.42.1 ignores α, so its scale is 1 here.
    names = [name for name in names if name.startswith(component)]
    original = adapter(names, scales=(1.0,))
    loralens.convert(original, to="kohya", output=tmp_path / "kohya.safetensors")
    tensors = {key: torch.from_numpy(tensor) for key, tensor in load_file(tmp_path / "kohya.safetensors").items()}
    if component == "unet.":
        unet = SimpleNamespace(layers_per_block=2, down_block_types=[None] * 3)
        tensors, _ = converters._convert_non_diffusers_lora_to_diffusers(
            converters._maybe_map_sgm_blocks_to_diffusers(tensors, unet)
        )
    else:
        tensors = converters._convert_kohya_flux_lora_to_diffusers(tensors)
    read = {}
    for key, down in tensors.items():
        if not re.search(r"\.down\.|\.lora_A\.", key):
            continue
        name = re.split(r"(?:_lora|\.lora)\.down|\.lora_A", key.replace(".processor", ""), maxsplit=1)[0]
        up = tensors[key.replace(".down.", ".up.").replace("lora_A", "lora_B")]
        name = component + re.sub(r"\.to_out$", ".to_out.0", name).removeprefix(component)
        read[name] = loralens.LowRank(up.flatten(1).numpy(), down.flatten(1).numpy(), 1.0)
    # Rows of zeros are read as layers, too.
    assert set(read) >= set(original)
    for name, module in read.items():
        check_close(applied(module), applied(original[name]) if name in original else 0 * applied(module))


def test_a_choice_between_two_models_is_not_made_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """FLUX.1 and Qwen-Image have this layer, and kohya's software has other names for it in each."""
    pair = loralens.LowRank(np.ones((3072, 1), np.float32), np.ones((1, 3072), np.float32))
    adapter = loralens.Adapter(modules={"transformer.transformer_blocks.0.attn.to_q": pair}, format="diffusers")
    loralens.convert(adapter, to="kohya", output=tmp_path / "a.safetensors")
    assert "whether it is of FLUX.1 or of Qwen-Image" in caplog.text
    caplog.clear()
    for base in ("black-forest-labs/FLUX.1-dev", "Qwen/Qwen-Image"):
        named = dataclasses.replace(adapter, base_model=base)
        loralens.convert(named, to="kohya", output=tmp_path / "b.safetensors", overwrite=True)
        assert "whether it is of" not in caplog.text
