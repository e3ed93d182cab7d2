"""``loralens amplify``: exact output on a small adapter and base, the JSON contract, figures, both error exits."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter

MODULE_KEYS = {
    "name", "rank", "delta_norm", "weight_norm", "projected_norm", "top_norm", "random_norm", "amplification",
    "excess", "z", "far_chance", "curve",
}  # fmt: skip
QUERY = "model.layers.0.self_attn.q_proj"

run = Command().run


def small_base(folder: Path) -> Path:
    """W = diag(8, 4, 2, 1) under two rows of zeros, for every module; the directions of ΔW are the first two."""
    W = np.vstack([np.diag([8, 4, 2, 1]), np.zeros((2, 4))]).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": W.copy() for name in small_adapter()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("bases") / "base")


TABLE = """\
In its own directions ΔW is 0.5 times as strong as W (median of 5 modules).
They catch 2.38 times as much of W as random directions do; 5 of 5 modules are beyond 3 standard deviations; by \
chance there would be 0.075 modules.

PATH on BASE: 6 modules; ‖UᵀWV‖F with U, V of ΔW, of W, random
module                            r  ‖ΔW‖F  ‖W‖F  UᵀWV: ΔW      W  random  amplification  excess      z
model.layers.0.self_attn.q_proj   2  4.472  9.22     8.944  8.944   3.764            0.5   2.376  +6.11
model.layers.0.self_attn.v_proj   2  4.123  9.22     8.944  8.944   3.764          0.461   2.376  +6.11
model.layers.1.self_attn.q_proj   2  4.472  9.22     8.944  8.944   3.764            0.5   2.376  +6.11
model.layers.1.self_attn.v_proj   2  4.123  9.22     8.944  8.944   3.764          0.461   2.376  +6.11
model.layers.10.self_attn.q_proj  2  4.472  9.22     8.944  8.944   3.764            0.5   2.376  +6.11
1 row of ΔW = 0 (--verbose shows every row)

medians by kind
kind    modules  amplification  excess      z  |z| > 3  by chance
q_proj        3            0.5   2.376  +6.11        3      0.045
v_proj        2          0.461   2.376  +6.11        2       0.03

amplification 0.461 to 0.5; ‖ΔW‖/‖W‖ 0.4472 to 0.4851; excess over random 2.376
"""


def test_json_keeps_its_contract(small: Path, base: Path) -> None:
    record = json.loads(run("amplify", small, "--base", base, "--json").stdout)
    assert (record["adapter"], record["base"], record["device"]) == (str(small), str(base), "cpu")
    assert [module["name"] for module in record["modules"]] == list(small_adapter())
    assert all(set(module) >= MODULE_KEYS for module in record["modules"])
    query = record["modules"][0]
    assert query["amplification"] == pytest.approx(20**0.5 / 80**0.5)
    assert query["relative_norm"] == pytest.approx(20**0.5 / 85**0.5)
    assert query["curve"][-1] == {key: query[key] for key in query["curve"][-1]}
    assert [row["rank"] for row in query["curve"]] == [1, 2]
    assert query["curve"][0]["amplification"] == pytest.approx(4 / 8)
    assert [d["amplification"] for d in query["directions"]] == pytest.approx([4 / 8, 2 / 4])
    assert query["top"]["sigma"] == pytest.approx([8, 4])
    np.testing.assert_allclose(query["phi"]["out"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(query["phi"]["chance_in"], [[1 / 4, 2 / 4], [2 / 4, 2 / 4]])
    np.testing.assert_allclose(query["phi"]["chance_out"], [[1 / 6, 2 / 6], [2 / 6, 2 / 6]])
    zero = record["modules"][-1]
    assert (zero["rank"], zero["delta_norm"], zero["amplification"], zero["z"], zero["curve"]) == (0, 0, None, None, [])


def test_ranks_no_top_and_modules(small: Path, base: Path) -> None:
    options = ("--rank", "2", "--rank", "1", "--no-top", "-m", "q_proj", "-m", "*.10.*")
    result = run("amplify", small, "--base", base, *options)
    lines = result.stdout.splitlines()
    assert "of W, random" not in result.stdout
    rows = [line.split() for line in lines[2:] if line.startswith("model.")]
    assert [(row[0].split(".")[2], row[1]) for row in rows] == [
        ("0", "1"), ("0", "2"), ("1", "1"), ("1", "2"), ("10", "1"), ("10", "2"),
    ]  # fmt: skip
    modules = json.loads(run("amplify", small, "--base", base, *options, "--json").stdout)["modules"]
    assert [(module["rank"], len(module["curve"]), module["nominal_rank"]) for module in modules[:2]] == [
        (1, 1, 2), (2, 2, 2),
    ]  # fmt: skip
    assert modules[0]["top_norm"] is modules[0]["phi"] is None


def test_the_paths_of_no_top_and_exact_agree(small: Path, base: Path) -> None:
    first, second, third = (
        json.loads(run("amplify", small, "--base", base, "--json", *options).stdout)["modules"]
        for options in ((), ("--no-top",), ("--exact", "--seed", "3", "--directions", "4"))
    )
    for one, other, exact in zip(first, second, third, strict=True):
        for key in ("delta_norm", "weight_norm", "projected_norm", "random_norm", "amplification", "excess", "z"):
            assert one[key] == other[key] == exact[key]
    assert len(third[0]["phi"]["in"][0]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--base", "BASE"], "no such file or folder"),
        (["SMALL", "--base", "nowhere"], "nowhere: no such file or folder"),
        (["SMALL", "--base", "BASE", "--modules", "k_prj"], "the nearest names are"),
        (["SMALL", "--base", "BASE", "--rank", "3"], "rank 3 is not between 1 and 2, the largest rank"),
        (["SMALL", "--base", "BASE", "--device", "tpu"], "no device is called 'tpu'"),
        (["SMALL", "--base", "BASE", "--plot", "out.gif"], "out.gif"),
        (["SMALL", "--base", "OTHER"], "have no weight in the base"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(
    small: Path, base: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    save_file({"other.weight": np.zeros((6, 4), np.float32)}, tmp_path / "model.safetensors")
    places = {"SMALL": str(small), "BASE": str(base), "OTHER": str(tmp_path)}
    result = run("amplify", *(places.get(a, a) for a in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\n  fix: " in result.stderr
    assert result.stdout == ""


def test_what_is_not_in_the_update_is_said(tmp_path: Path, base: Path) -> None:
    from safetensors.numpy import load_file

    loralens.save(small_adapter(), tmp_path / "dora")
    file = tmp_path / "dora" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in small_adapter():
        tensors[f"base_model.model.{name}.lora_magnitude_vector"] = np.ones(6, np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "dora" / "adapter_config.json").read_text())
    (tmp_path / "dora" / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    result = run("amplify", tmp_path / "dora", "--base", base)
    assert "6 modules are DoRA" in result.stderr
    assert result.exit_code == 0


def test_names_that_had_to_be_edited_are_said(small: Path, tmp_path: Path) -> None:
    base = small_base(tmp_path)
    tensors = {key.removeprefix("model."): np.eye(6, 4, dtype=np.float32) for key in loralens_keys()}
    save_file(tensors, base / "model.safetensors")
    assert "6/6 modules match after dropping 'model.'" in run("amplify", small, "--base", base).stderr


def loralens_keys() -> list[str]:
    return [f"{name}.weight" for name in small_adapter()]


def test_a_float8_base_is_read_and_said(small: Path, tmp_path: Path) -> None:
    import ml_dtypes

    W = np.vstack([np.diag([8, 4, 2, 1]), np.zeros((2, 4))])
    tensors = {}
    for key in loralens_keys():
        tensors |= {key: (W / 4).astype(ml_dtypes.float8_e4m3fn), f"{key}_scale": np.full((6, 1), 4, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    result = run("amplify", small, "--base", tmp_path)
    assert result.stdout.replace(str(small), "PATH").replace(str(tmp_path), "BASE") == TABLE
    assert "6 float8 weights are read as float32" in result.stderr
