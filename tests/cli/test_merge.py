"""``loralens merge``: what stands in OUT, what is said of it, and what is refused."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from tests.bases import CONFIG, MODULES, contents, record_in, sharded, single, stored, tensors
from tests.cli.command import Command
from tests.conftest import small_adapter
from tests.models import low_rank

CERTIFICATE, UNDO = "merge_certificate.json", "undo.loralens"
MODULE_KEYS = {
    "name", "weight", "gain", "relative_error", "subspace_error", "unmoved", "predicted_gain",
    "predicted_relative_error", "predicted_unmoved", "directions", "surviving", "overflowed",
}  # fmt: skip
TOTAL_KEYS = {
    "tensors", "gain", "relative_error", "subspace_error", "unmoved", "predicted_gain", "predicted_relative_error",
    "predicted_unmoved",
    "overflowed", "undo_bytes", "undo_bits_per_weight",
}  # fmt: skip

CALL = Command()
run, done, refused, told = CALL.run, CALL.good, CALL.refused, CALL.told


def expected(held, strength: float = 1.0):
    """W + strength·ΔW, dense, rounded once."""
    found = dict(held)
    for name, update in small_adapter().modules.items():
        W = held[f"{name}.weight"]
        found[f"{name}.weight"] = (W.astype(float) + strength * update.dense()).astype(np.float32).astype(W.dtype)
    return found


def check(found, wanted) -> None:
    assert set(found) == set(wanted)
    for key, array in wanted.items():
        assert found[key].dtype == array.dtype, key
        np.testing.assert_array_equal(found[key], array, err_msg=key)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return single(tmp_path / "base", tensors())


@pytest.mark.parametrize("make", [single, sharded])
def test_weights_are_merged_and_all_else_stays(make, small: Path, tmp_path: Path) -> None:
    held = tensors()
    base = make(tmp_path / "base", held)
    before = contents(base)
    done("merge", f"{small}:0.5", "--base", base, "-o", tmp_path / "out")
    assert contents(base) == before
    check(stored(tmp_path / "out"), expected(held, 0.5))
    after = contents(tmp_path / "out")
    assert set(after) == {*before, UNDO, CERTIFICATE}
    for name, data in before.items():
        if name.endswith(".safetensors"):
            length = 8 + int.from_bytes(data[:8], "little")
            assert after[name][:length] == data[:length]
        else:
            assert after[name] == data


def test_a_single_file_is_merged_into_a_single_file(small: Path, tmp_path: Path) -> None:
    held = tensors()
    base = single(tmp_path / "base", held) / "model.safetensors"
    done("merge", small, "--base", base, "-o", tmp_path / "merged.safetensors")
    check(stored(tmp_path / "merged.safetensors"), expected(held))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"base", "merged.safetensors", f"merged.{UNDO}", f"merged.{CERTIFICATE}"}
    done("unmerge", tmp_path / "merged.safetensors", "-o", tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_a_pipeline_keeps_its_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    unet = {"mid.to_q.weight": rng.standard_normal((6, 4)).astype(np.float16)}
    vae = {"x.weight": rng.standard_normal((3, 2)).astype(np.float16)}
    base = tmp_path / "pipeline"
    for name, held in (("unet", unet), ("vae", vae)):
        single(base / name, held, name="diffusion_pytorch_model.safetensors", config={})
    (base / "model_index.json").write_text("{}")
    one = loralens.LowRank(np.ones((6, 2), np.float32), np.ones((2, 4), np.float32), 0.5)
    loralens.save(loralens.Adapter(modules={"unet.mid.to_q": one}), tmp_path / "adapter")
    done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    found = stored(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")["mid.to_q.weight"]
    np.testing.assert_array_equal(found, (unet["mid.to_q.weight"].astype(np.float32) + 1).astype(np.float16))
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize(("option", "name"), [("f32", "float32"), ("f16", "float16"), ("bf16", "bfloat16")])
@pytest.mark.parametrize("make", [single, sharded])
def test_a_whole_model_in_another_dtype(make, option: str, name: str, small: Path, tmp_path: Path) -> None:
    held = tensors(np.float32) | {"position_ids": np.arange(5)}
    base = make(tmp_path / "base", held)
    done("merge", small, "--base", base, "-o", tmp_path / "out", "--dtype", option)
    wide = expected(held)
    check(stored(tmp_path / "out"), {k: v.astype(name) if v.dtype.kind == "f" else v for k, v in wide.items()})
    assert record_in(tmp_path / "out" / "config.json")["torch_dtype"] == name
    if make is sharded:
        index = record_in(tmp_path / "out" / "model.safetensors.index.json")
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in stored(tmp_path / "out").values())
        assert index["metadata"]["x"] == 1
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def float8(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A base whose linear weights are float8 under scales of blocks, and the numbers they stand for."""
    held, real = {}, {}
    for key, array in tensors(np.float32).items():
        real[key] = array.astype(ml_dtypes.bfloat16)
        held[key] = real[key]
        if "proj" in key:
            scale = (np.abs(array).max() / 448 * np.ones((1, 1))).astype(np.float32)
            held[key] = (array / scale).astype(ml_dtypes.float8_e4m3fn)
            held[f"{key}_scale_inv"] = scale
            real[key] = held[key].astype(np.float32) * scale
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return single(folder, held, config={**CONFIG, "quantization_config": quantised}), real


def test_float8_with_scales_stays_float8_under_the_same_scales(small: Path, tmp_path: Path) -> None:
    base, real = float8(tmp_path / "base")
    result = done("merge", small, "--base", base, "-o", tmp_path / "out")
    assert "6 weights are float8 with scales: they are decoded, merged, and rounded to float8 again" in result.stderr
    found, before, wide = stored(tmp_path / "out"), stored(base), expected(real)
    for name in MODULES:
        key = f"{name}.weight"
        scale = before[f"{key}_scale_inv"]
        np.testing.assert_array_equal(found[f"{key}_scale_inv"], scale)
        assert found[key].dtype == ml_dtypes.float8_e4m3fn
        limit = 448 * scale
        apart = np.abs(found[key].astype(np.float32) * scale - np.clip(wide[key], -limit, limit))
        assert (apart <= np.maximum(np.abs(wide[key]) / 16, scale * 2.0**-9) * 1.01).all()
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert (
        done("verify", tmp_path / "out", "--base", base, "--adapter", small).stdout.splitlines()[0].endswith("exactly.")
    )
    assert "error feedback is not available for float8 weights" in refused(
        "merge", small, "--base", base, "-o", tmp_path / "fed", "--rounding", "feedback"
    )


def test_a_tied_model_is_untied_and_tied_again(tmp_path: Path) -> None:
    held = tensors()
    del held["lm_head.weight"]
    base = sharded(tmp_path / "base", held, config={**CONFIG, "tie_word_embeddings": True})
    pair = loralens.LowRank(np.ones((5, 2), np.float32), np.ones((2, 4), np.float32), 1.0)
    modules = {"lm_head": pair, "model.layers.0.self_attn.q_proj": small_adapter().modules[MODULES[0]]}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "adapter")
    assert "lm_head.weight and model.embed_tokens.weight have different updates" in refused(
        "merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out", "--keep-tied"
    )
    result = done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "lm_head.weight: written as a weight of its own" in result.stderr
    found = stored(tmp_path / "out")
    embedding = held["model.embed_tokens.weight"]
    np.testing.assert_array_equal(found["model.embed_tokens.weight"], embedding)
    np.testing.assert_array_equal(found["lm_head.weight"], (embedding.astype(np.float32) + 2).astype(embedding.dtype))
    index = record_in(tmp_path / "out" / "model.safetensors.index.json")
    assert index["weight_map"]["lm_head.weight"] == "model-00003-of-00003.safetensors"
    assert record_in(tmp_path / "out" / "config.json")["tie_word_embeddings"] is False
    assert done("verify", tmp_path / "out", "--base", base, "--adapter", tmp_path / "adapter").exit_code == 0
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_missing_modules_are_an_error_or_left_out(small: Path, tmp_path: Path) -> None:
    held = {key: array for key, array in tensors().items() if ".10." not in key}
    base = single(tmp_path / "base", held)
    said = refused("merge", small, "--base", base, "-o", tmp_path / "out")
    assert "model.layers.10.self_attn.q_proj" in said
    assert "--allow-missing" in said
    result = done("merge", small, "--base", base, "-o", tmp_path / "out", "--allow-missing")
    assert "left out, as the base has no place for them: model.layers.10.self_attn.q_proj" in result.stderr
    certificate = record_in(tmp_path / "out" / CERTIFICATE)
    assert certificate["missing"] == [name for name in MODULES if ".10." in name]
    assert len(certificate["modules"]) == 4


def test_a_weight_that_is_no_number_is_named_with_its_adapter(small: Path, base: Path, tmp_path: Path) -> None:
    assert f"{small}: the weight cannot be nan\n  fix: give a finite number" in refused(
        "merge", f"{small}:nan", "--base", base, "-o", tmp_path / "out"
    )


def test_the_certificate_keeps_its_contract(small: Path, base: Path, tmp_path: Path) -> None:
    record = told("merge", f"{small}:2", "--base", base, "-o", tmp_path / "out")
    assert record_in(tmp_path / "out" / CERTIFICATE) == record
    assert record["loralens"] == loralens.__version__
    assert [set(module) for module in record["modules"]] == [MODULE_KEYS] * 6
    assert [module["name"] for module in record["modules"]] == MODULES
    assert set(record["total"]) == TOTAL_KEYS
    (one,) = record["adapters"]
    assert (one["path"], one["weight"], len(one["fingerprint"])) == (str(small), 2.0, 32)
    assert len({record["base"]["sha256"], record["result"]["sha256"]}) == 2
    back = told("merge", small, "--base", tmp_path / "out", "-o", tmp_path / "more")
    assert back["base"]["sha256"] == record["result"]["sha256"]


def test_swallowed_updates_are_said_with_a_way_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    W = (0.02 * rng.standard_normal((64, 64))).astype(ml_dtypes.bfloat16)
    base = single(tmp_path / "base", {"a.weight": W})
    loralens.save(loralens.Adapter(modules={"a": low_rank(64, 64, scale=2e-5)}), tmp_path / "adapter")
    result = done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "warning: rounding to bfloat16 damages 1 of 1 updates; worst is a: gain 0." in result.stderr
    assert (
        "fix: write --dtype f32 (or f16, where the model runs in it), serve the adapter unmerged, or take"
        in result.stderr
    )
    assert done("merge", tmp_path / "adapter", "--base", base, "--dry-run", "--dtype", "f32").stderr == ""


def test_overflow_is_said(tmp_path: Path) -> None:
    base = single(tmp_path / "base", {"a.weight": np.full((4, 4), 6e4, np.float16)})
    one = loralens.LowRank(np.full((4, 1), 200, np.float32), np.full((1, 4), 200, np.float32), 1.0)
    loralens.save(loralens.Adapter(modules={"a": one}), tmp_path / "adapter")
    result = done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert "warning: 16 weights became infinite, because they are too large for float16" in result.stderr
    assert "fix: write --dtype f32" in result.stderr
    assert "16 weights became infinite. Elsewhere the update arrived with a gain" in result.stdout
    json.loads((tmp_path / "out" / CERTIFICATE).read_text(), parse_constant=lambda name: pytest.fail(name))
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_a_base_with_nan_is_told_of(tmp_path: Path, dtype) -> None:
    tensors = {f"{name}.weight": np.ones((64, 8), dtype) for name in "ab"}
    tensors["b.weight"][3, 4], tensors["b.weight"][40, 1] = np.nan, np.inf
    base = single(tmp_path / "base", tensors)
    one = loralens.LowRank(np.ones((64, 1), np.float32), np.ones((1, 8), np.float32))
    loralens.save(loralens.Adapter(modules={"a": one, "b": one}), tmp_path / "adapter")
    result = done("merge", tmp_path / "adapter", "--base", base, "-o", tmp_path / "out")
    assert (
        "warning: NaN or infinity in 2 adapted weights of the base, which the merge leaves as it is: b\n"
        in result.stderr
    )
    assert "fix: download the base again" in result.stderr
    assert "became infinite" not in result.stdout + result.stderr
    done("unmerge", tmp_path / "out", "-o", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
