"""``loralens compress``: exact output on a small adapter, the JSON contract, every refusal, nothing left behind."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens import Moments, fingerprint, save_moments
from loralens.compression import losses
from loralens.core import Moment
from tests.bases import peft_folder, single
from tests.cli.command import Command
from tests.compression.truncation import total_error

Q = "model.layers.0.self_attn.q_proj"

run, told, refused = Command().run, Command("compress").told, Command().refused


def test_json_keeps_its_contract(small: Path, tmp_path: Path) -> None:
    record = told(small, "-o", tmp_path / "out", "--rank", 1)
    assert set(record) == {"loralens", "source", "target", "format", "modules", "total", "smaller", "notes"}
    module = record["modules"][0]
    assert module == {
        "name": Q, "shape": [6, 4], "rank_before": 2, "rank_after": 1, "relative_error": pytest.approx(0.2**0.5),
        "spectral_error": pytest.approx(0.5), "energy_kept": pytest.approx(0.8),
    }  # fmt: skip
    file = tmp_path / "out" / "adapter_model.safetensors"
    assert record["total"] == {
        "relative_error": pytest.approx((14 / 94) ** 0.5), "modules_before": 6, "modules_after": 6,
        "parameters_before": 120, "parameters_after": 60,
        "bytes_before": (small / "adapter_model.safetensors").stat().st_size, "bytes_after": file.stat().st_size,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "ranks"),
    [
        (["--rank", 1], [1, 1, 1, 1, 1, 1]),
        (["--energy", "0.9"], [2, 1, 2, 1, 2, 1]),
        (["--error", "0.3"], [2, 1, 2, 1, 2, 1]),
        (["--sv-ratio", "2.1"], [2, 1, 2, 1, 2, 1]),
        (["--sv-cumulative", "1"], [2, 2, 2, 2, 2, 1]),  # the last one does nothing
        (["--parameters", "90", "--rank", 1], [1, 1, 1, 1, 1, 1]),
        (["--energy", "0.9", "--rank", 9, "--uniform"], [2, 2, 2, 2, 2, 2]),
        (["--parameters", "80"], [2, 1, 2, 1, 1, 1]),
        (["--parameters", "80", "--uniform"], [1, 1, 1, 1, 1, 1]),
        (["--energy", "0.9", "-m", "q_proj"], [2, 2, 2, 2, 2, 2]),
        (["--energy", "0.9", "--drop-dead"], [2, 1, 2, 1, 2, 0]),
    ],
)
def test_rules(rule: list[object], ranks: list[int], small: Path, tmp_path: Path) -> None:
    record = told(small, "-o", tmp_path / "out", *rule)
    assert [module["rank_after"] for module in record["modules"]] == ranks
    back = loralens.load(tmp_path / "out")
    assert [module.rank for module in back.modules.values()] == [rank for rank in ranks if rank]
    assert record["total"]["relative_error"] == pytest.approx(total_error(losses(loralens.load(small), back)))


def test_size_is_kept_to_the_byte(small: Path, tmp_path: Path) -> None:
    for budget in (1700, 1750, 1800):
        record = told(small, "-o", tmp_path / "out", "--size", budget, "--overwrite")
        size = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
        assert size == record["total"]["bytes_after"] <= budget
        assert sum(module["rank_after"] for module in record["modules"]) == 11 or size > budget - 40 - 16


def loha(file: Path, modules: str, sizes: tuple[int, int, int]) -> None:
    """A LoHa in float16 of modules whose factors have these sizes: outputs, rank, inputs."""
    rng, (out, rank, in_) = np.random.default_rng(0), sizes
    shapes = {f"hada_w{i}_{half}": shape for i in (1, 2) for half, shape in (("a", (out, rank)), ("b", (rank, in_)))}
    held = {f"lora_unet_{m}.{key}": rng.standard_normal(shapes[key]).astype("f2") for m in modules for key in shapes}
    save_file(held, file)


def test_products_keep_the_dtype_of_the_file_and_a_larger_file_is_not_a_success(tmp_path: Path) -> None:
    """The factors of a LoHa are products, which are computed in float32."""
    loha(tmp_path / "loha.safetensors", "a", (64, 4, 48))
    for rank, more, code, said in (
        (3, (), 0, "smaller than"),
        (16, (), 1, "larger than"),
        (16, ("--force",), 0, "larger than"),
        (16, ("--only-if-smaller", "--force"), 1, "Nothing was written"),
    ):
        out = tmp_path / f"{rank}{len(more)}.safetensors"
        arguments = ("compress", tmp_path / "loha.safetensors", "-o", out, "--to", "kohya", "--rank", rank, *more)
        result = Command().run(*arguments)
        assert (result.exit_code, said in result.stdout.splitlines()[0]) == (code, True)
        if said != "Nothing was written":
            assert {str(module.dtype) for module in loralens.load(out).modules.values()} == {"float16"}


@pytest.mark.parametrize(
    "call",
    [
        ("compress", "loha.safetensors", "--rank", 3),
        ("scale", "loha.safetensors", "--by", 0.5),
        ("drop", "loha.safetensors", "-m", "*_b"),
        ("combine", "loha.safetensors", "loha.safetensors:0.5"),
        ("combine", "loha.safetensors", "loha.safetensors:0.5", "--method", "ties"),
        ("convert", "loha.safetensors", "--to", "peft"),
        ("convert", "wide.safetensors", "--to", "kohya", "--rank", 2),
    ],
)
def test_new_factors_have_the_dtype_of_the_source(
    call: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file, rank in (("loha", 2), ("wide", 5)):  # products of rank 4 are pairs, and those of rank 25 are not
        loha(Path(f"{file}.safetensors"), "ab", (32, rank, 24))
    result = run(*call, "-o", "out.safetensors")
    assert ("lycoris files are only read: written as kohya" in result.stderr) == ("--to" not in call)
    assert {str(module.dtype) for module in loralens.load("out.safetensors").modules.values()} == {"float16"}


def test_activations(small: Path, tmp_path: Path) -> None:
    adapter = loralens.load(small)
    K = np.diag([1e-4, 1.0])  # the second direction is all that the data knows
    moments = Moments(modules={name: Moment(K, 10) for name in adapter}, fingerprint=fingerprint(adapter))
    save_moments(moments, tmp_path / "k.safetensors")
    record = told(small, "-o", tmp_path / "out", "--rank", 1, "--activations", tmp_path / "k.safetensors")
    query = record["modules"][0]
    assert query["relative_error"] == pytest.approx(0.8**0.5, rel=1e-5)
    assert query["data_error"] == pytest.approx((16e-4 / (16e-4 + 4)) ** 0.5, rel=1e-3)
    assert record["total"]["data_error"] < 0.1
    shown = run("compress", small, "--dry-run", "--rank", 1, "--activations", tmp_path / "k.safetensors").stdout
    assert "on data" in shown


def test_dora_is_solved_anew_with_the_base_and_kept_without(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    W, m = rng.standard_normal((7, 5)).astype(np.float32), (1 + rng.random(7)).astype(np.float32)
    tensors = {
        "fc.lora_A.weight": rng.standard_normal((3, 5)).astype(np.float32),
        "fc.lora_B.weight": rng.standard_normal((7, 3)).astype(np.float32),
        "fc.lora_magnitude_vector": m,
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["fc"], "use_dora": True}
    folder = peft_folder(tmp_path / "dora", tensors, config)
    base = single(tmp_path / "base", {"fc.weight": W}, config={})
    kept = told(folder, "-o", tmp_path / "kept", "--rank", 1)
    solved = told(folder, "-o", tmp_path / "solved", "--rank", 1, "--base", base)
    assert kept["notes"] == ["magnitudes of 1 DoRA modules kept; with --base they are solved anew"]
    assert solved["notes"] == ["magnitudes of 1 DoRA modules solved anew"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", 1, "-o", "SMALL/adapter_model.safetensors", "--overwrite"], "is where the source is"),
        (["--rank", 1, "-o", "SMALL/other.safetensors", "--overwrite"], "would share adapter_config.json"),
        (["--rank", 1, "-o", "THERE"], "exists"),
        (["--size", "1KB", "-o", "out"], "rank 1 everywhere"),
        (["--parameters", "59", "-o", "out"], "at least 60 parameters"),
        (["--rank", 1, "-o", "out.bin"], "not written to .bin"),
    ],
)
def test_refusals(
    arguments: list[object], message: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "THERE").mkdir()
    said = refused("compress", small, *(str(a).replace("SMALL", str(small)) for a in arguments))
    assert message in said
    assert "\n  fix: " in said
    assert [path.name for path in tmp_path.iterdir()] == ["THERE"]


def test_weights_from_a_file(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text('{"v_proj": 1000}')
    record = told(small, "--dry-run", "--parameters", 80, "--weights", file)
    assert [module["rank_after"] for module in record["modules"]] == [1, 2, 1, 2, 1, 1]
    for text, message in (("{", "JSON"), ("[1]", "not a JSON object"), ('{"v_proj": "x"}', "the weight of v_proj")):
        file.write_text(text)
        assert message in run("compress", small, "--dry-run", "--parameters", 80, "--weights", file).stderr
