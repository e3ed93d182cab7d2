"""Base models on disk: one file, shards, pipelines, cache folders; and what is refused, with the way out."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens import FormatError, OptionError
from loralens.formats import open_checkpoint
from tests.bases import sharded, single
from tests.conftest import small_adapter
from tests.formats.files import model_config, shapes, weights


def array(*shape, dtype=np.float32):
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_folder_a_file_and_shards_are_read_alike(tmp_path, dtype):
    a, b = array(3, 5, dtype=dtype), array(4, 2, dtype=dtype)
    held = {"a.weight": a, "b.weight": b}
    folder = single(tmp_path / "one", held)
    for path in (folder, folder / "model.safetensors", sharded(tmp_path / "many", held, shards=2)):
        found = open_checkpoint(path)
        assert found.notes == ()
        assert {key: tensor.dtype for key, tensor in found.tensors.items()} == dict.fromkeys(
            ("a.weight", "b.weight"), dtype
        )
        np.testing.assert_array_equal(found.tensors["a.weight"].read(), a)
        np.testing.assert_array_equal(found.tensors["b.weight"].rows(1, 3).read(), b[1:3])
        assert shapes(path) == {"a.weight": (3, 5), "b.weight": (4, 2)}


def cache(tmp_path: Path, *revisions: str, main: str | None) -> Path:
    hub = tmp_path / "models--org--name"
    for i, revision in enumerate(revisions, start=1):
        single(hub / "snapshots" / revision, {"a.weight": array(i, 2)}, config={"model_type": "gpt2"})
    if main is not None:
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text(main + "\n")
    return hub


@pytest.mark.parametrize(("revisions", "main", "rows"), [(("x", "y"), "y", 2), (("x",), None, 1)])
def test_the_cache_folder_of_a_model_is_the_model(tmp_path, revisions, main, rows, monkeypatch):
    hub = cache(tmp_path, *revisions, main=main)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for path in (hub, Path("org/name")):
        assert weights(path)["a.weight"].shape == (rows, 2)
        assert model_config(path) == {"model_type": "gpt2"}
        assert open_checkpoint(path).conv1d


@pytest.mark.parametrize(("revisions", "main"), [(("x", "y"), None), (("x",), "gone"), ((), None)])
def test_a_cache_folder_without_one_snapshot_says_so(tmp_path, revisions, main):
    hub = cache(tmp_path, *revisions, main=main)
    (hub / "snapshots").mkdir(parents=True, exist_ok=True)
    with pytest.raises(OptionError, match="none of its snapshots") as error:
        weights(hub)
    assert ", ".join(revisions) in str(error.value)


def test_what_holds_no_weights_says_what_it_holds(tmp_path):
    with pytest.raises(FormatError, match="no safetensors weights"):
        weights(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(FormatError) as error:
        weights(tmp_path)
    assert "convert pytorch_model.bin to safetensors" in error.value.fix


def test_a_damaged_gguf_file_is_refused_as_a_file_and_as_a_folder(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(60))
    for path in (file, tmp_path):
        for read in (weights, shapes):
            with pytest.raises(FormatError, match=r"model\.gguf: is GGUF version 0"):
                read(path)


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_an_adapter_is_not_a_model(tmp_path, form):
    path = tmp_path / "adapter.safetensors"
    loralens.save(small_adapter(), path, format=form)
    for read in (open_checkpoint, shapes):
        with pytest.raises(OptionError, match="is an adapter and not a model") as refused:
            read(path)
        assert refused.value.fix == "give the base model that it was trained on"


def test_a_model_with_factors_beside_its_weights_is_not_refused_as_an_adapter(tmp_path):
    held = {"q.base_layer.weight": np.ones((4, 4), np.float32), "q.lora_A.weight": np.ones((1, 4), np.float32)}
    save_file(held, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).tensors.keys() == held.keys()


@pytest.mark.parametrize("kind", [{}, 3], ids=str)
def test_a_model_type_that_is_not_text_is_refused(tmp_path, kind):
    single(tmp_path, {"a.weight": np.ones((2, 2), np.float32)}, config={"model_type": kind})
    with pytest.raises(FormatError, match=r"config\.json: says that the model_type is"):
        open_checkpoint(tmp_path)
