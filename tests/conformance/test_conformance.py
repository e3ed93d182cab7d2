"""One tiny adapter of every dialect against its expected ΔW, made by the dialect's own software.

Each folder beside this file holds an adapter, ``expected.safetensors`` (ΔW in float64 by canonical module name, made by
the script ``make_<dialect>.py``, never by loralens) and, where the file does not say all, ``load.json``.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loralens
from loralens import LowRank
from loralens.analysis.equality import differences
from loralens.core import LazyArray
from loralens.core.image_names import ORIGINAL, is_of_diffusers_transformer
from loralens.core.names import is_expert_alone
from loralens.formats import FORMATS, Stored
from tests.formats.stores import numbered
from tests.tolerances import CONFORMANCE

HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in HERE.iterdir() if (folder / "expected.safetensors").is_file())
WRITABLE = {form.name: form for form in FORMATS if form.writer}
MARKS = ("expected.safetensors", "load.json")


def adapter_path(case: str) -> Path:
    """The adapter of a case: its folder where it has a configuration, else its one file."""
    folder = HERE / case
    files = [file for file in folder.iterdir() if file.name not in MARKS]
    weights = [file for file in files if file.suffix != ".json"]
    assert len(weights) == 1, weights
    return weights[0]


def options(case: str) -> dict[str, object]:
    file = HERE / case / "load.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def loaded(case: str) -> loralens.Adapter:
    return loralens.load(adapter_path(case), **options(case))  # type: ignore[arg-type]


# One key of a pair, of which the other has up for down, B for A or b for a → the dialect whose file it is.
CLAIMED = {
    "base_model.model.unet.x.lora_A.weight": "peft",
    "transformer.h.0.attn.c_attn.lora_A.weight": None,
    "transformer.x.to_q.lora_A.weight": "diffusers",
    "unet.x.to_q.lora.down.weight": "diffusers",
    "down_blocks.0.attn1.processor.to_q_lora.down.weight": "diffusers",
    "transformer.x.y.lora_down.weight": "comfyui",
    "diffusion_model.x.y.lora_A.weight": "comfyui",
    "diffusion_model.double_blocks.0.processor.qkv_lora1.down.weight": "xlabs",
    "lora_unet_x.lora_down.weight": "kohya",
    "roberta.x.query.lora_A": "loralib",
    "transformer.h.0.attn.qkv.lora_A": "litgpt",
    "transformer.x.lora_a": "mlx",
    "transformer.x.lora_a.weight": "torchtune",
    "unet:0:down": "safeloras",
    "w_a_000": "plain",
    "lora_unet_x.lora_down": None,
    "single_blocks.3.processor.qkv_lora1.down.weight": None,
}


def named(key: str) -> Stored:
    other = key.replace("w_a", "w_b")
    for one, two in (("down", "up"), ("lora_A", "lora_B"), ("lora_a", "lora_b")):
        other = two.join(other.rsplit(one, 1))
    return numbered({key: (2, 4), other: (4, 2)})


@pytest.mark.parametrize("key", CLAIMED)
def test_a_file_is_of_one_dialect_by_its_names(key: str) -> None:
    assert [form.name for form in FORMATS if form.detect(named(key))] == [CLAIMED[key]] * (CLAIMED[key] is not None)


def test_names_of_two_dialects_are_of_neither() -> None:
    both = named("lora_unet_x.lora_down.weight").tensors | named("diffusion_model.x.y.lora_down.weight").tensors
    assert not [form.name for form in FORMATS if form.detect(Stored(both))]


@pytest.mark.parametrize("case", CASES)
def test_every_update_is_the_expected_one(case: str) -> None:
    expected = load_file(HERE / case / "expected.safetensors")
    adapter = loaded(case)
    assert set(adapter) == set(expected)
    for name, delta in expected.items():
        found = adapter[name].dense()
        assert found.shape == delta.reshape(len(delta), -1).shape
        np.testing.assert_allclose(found, delta.reshape(found.shape), atol=CONFORMANCE * np.abs(delta).max())
        values = adapter[name].singular_values()
        s = np.linalg.svd(found, compute_uv=False)
        np.testing.assert_allclose(values, s[: values.size], atol=1e-12 * s[0])


@pytest.mark.parametrize("case", CASES)
def test_written_in_its_own_dialect_it_is_the_same_to_the_bit(case: str, tmp_path: Path) -> None:
    adapter = loaded(case)
    if adapter.format not in WRITABLE:
        pytest.skip(f"{adapter.format} is only read")
    files = WRITABLE[adapter.format].files
    assert files
    target = tmp_path / files.weights if files.config is None else tmp_path / "out"
    loralens.save(adapter, target)
    again = loralens.load(target, **options(case))  # type: ignore[arg-type]
    assert (list(again), again.config, again.metadata) == (list(adapter), adapter.config, adapter.metadata)
    extras = [{key: bits(extra.tensor) for key, extra in each.extra.items()} for each in (again, adapter)]
    assert extras[0] == extras[1]
    for name, module in adapter.items():
        assert again[name].scale == module.scale
        first, second = (each.origin.tensors for each in (module, again[name]))  # type: ignore[union-attr]
        assert {key: bits(second[key]) for key in first} == {key: bits(tensor) for key, tensor in first.items()}


def bits(tensor: LazyArray) -> tuple[object, bytes]:
    return tensor.dtype, tensor.read().tobytes()


def convertible(case: str, to: str) -> loralens.Adapter:
    """What ``to`` can hold of a case: plain pairs of one rank where it has but one, and names of a UNet for others."""
    adapter = loaded(case)
    kinds = ("linear",) if to in ("mlx", "loralib", "gguf") else ("linear", "conv")
    modules = {
        name: module.without_origin()
        for name, module in adapter.items()
        if isinstance(module, LowRank)
        and module.layout.kind in kinds
        and module.layout.groups == 1
        and not module.layout.rows  # in llama.cpp's order, which no other dialect can say
    }
    if to == "mlx":  # which has other names for experts, and needs the base for them
        modules = {name: module for name, module in modules.items() if not is_expert_alone(name)}
    if to == "mlx" and modules:
        rank = next(iter(modules.values())).rank
        modules = {name: module for name, module in modules.items() if module.rank == rank}

    def unnamed(name: str) -> bool:
        """Numbers, underscores for dots, and names of transformers that the dialect has under others."""
        foreign = is_of_diffusers_transformer if to == "kohya" else lambda name: name.startswith(ORIGINAL)
        return adapter.format == "safeloras" or "." not in name or (to in ("kohya", "diffusers") and foreign(name))

    names = {
        name: f"unet.down_blocks.{7 + i}.attentions.0.proj_in" if unnamed(name) else name
        for i, name in enumerate(modules)
    }
    chosen = loralens.Adapter(modules=modules, format=adapter.format, base_model=adapter.base_model)
    return chosen.renamed(names)


@pytest.mark.some(80)
@pytest.mark.parametrize("to", [name for name in WRITABLE if name != "gguf"])
@pytest.mark.parametrize("case", CASES)
def test_through_every_other_dialect_and_back(case: str, to: str, tmp_path: Path) -> None:
    adapter = convertible(case, to)
    if not len(adapter) or adapter.format == to:
        pytest.skip("nothing to convert")
    files = WRITABLE[to].files
    assert files
    target = tmp_path / files.weights if files.config is None else tmp_path / "out"
    loralens.save(adapter, target, format=to)
    back = loralens.load(target)
    assert back.format == to
    assert list(back) == list(adapter)
    assert max(one.relative for one in differences(adapter, back)) <= CONFORMANCE
