"""``loralens spectrum``: exact output on a small adapter, the JSON contract, both error exits."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter, small_base

CALL = Command()
run, told, good, refused = CALL.run, CALL.told, CALL.good, CALL.refused


@pytest.mark.parametrize(
    ("options", "blocks"),
    [
        (["--sort", "name"], ["0", "0", "1", "1", "10", "10"]),
        (["--top", "2"], ["0", "1"]),  # the largest norms: the queries
        (["--sort", "numerical_rank", "--top", "5"], ["0", "0", "1", "1", "10"]),
        (["--modules", "v_proj"], ["0", "1", "10"]),
        (["-m", "*.1.*", "-m", "model.layers.10.*.q_proj"], ["1", "1", "10"]),
    ],
)
def test_selection_and_order(small: Path, options: list[str], blocks: list[str]) -> None:
    modules = told("spectrum", *options, small)["adapters"][0]["modules"]
    assert [module["name"].split(".")[2] for module in modules] == blocks


def test_verbose_says_once_what_the_columns_mean(small: Path) -> None:
    told, brief = run("spectrum", small, "--verbose").stdout, run("spectrum", small).stdout
    assert "stable: stable rank: Σσ²/σ₁²\n" in told
    assert "E90: directions that hold 90 % of the energy\n" in told
    assert "stable:" not in brief
    # The tables of kinds and of blocks have the same columns.
    assert told.count("energy: part of the ‖ΔW‖² of all modules chosen\n") == 1


# ---- With a base: ΔW beside W


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("bases") / "base")


def test_the_table_has_two_columns_more(small: Path, base: Path) -> None:
    lines = run("spectrum", small, "--base", base).stdout.splitlines()
    title, heads, first, *_ = lines[lines.index("") + 1 :]  # below the conclusion
    assert "randomised" not in title
    assert heads.split()[-3:] == ["‖ΔW‖/‖W‖", "σ₁/σ₁(W)", "spectrum"]
    assert first.split()[-3:-1] == ["0.4851", "0.5"]
    assert "σ₁(W)" not in run("spectrum", small).stdout


def test_a_weight_of_zero_has_no_share(small: Path, tmp_path: Path) -> None:
    save_file({f"{name}.weight": np.zeros((6, 4), np.float32) for name in small_adapter()}, tmp_path / "m.safetensors")
    module = told("spectrum", small, "--base", tmp_path)["adapters"][0]["modules"][0]
    assert (module["weight_frobenius"], module["relative_frobenius"], module["relative_spectral"]) == (0, None, None)
    good("spectrum", small, "--base", tmp_path)


MODULE_KEYS = {
    "name", "shape", "rank", "scale", "dtype", "singular_values", "frobenius", "spectral", "nuclear", "numerical_rank",
    "stable_rank", "effective_rank", "effective_rank_energy", "participation_ratio", "energy_rank",
}  # fmt: skip


def test_json_keeps_its_contract(small: Path) -> None:
    record = told("spectrum", small)
    assert record["loralens"] == loralens.__version__
    (adapter,) = record["adapters"]
    assert (adapter["path"], adapter["format"], adapter["base_model"]) == (str(small), "peft", "tiny/base")
    assert all(set(module) >= MODULE_KEYS for module in adapter["modules"])
    query = adapter["modules"][0]
    assert query["name"] == "model.layers.0.self_attn.q_proj"
    assert (query["shape"], query["rank"], query["scale"], query["dtype"]) == ([6, 4], 2, 4.0, "float32")
    assert query["singular_values"] == [4.0, 2.0]
    assert [module["rank"] for module in adapter["modules"]] == [2] * 6  # of which one is zero
    assert (query["spectral"], query["nuclear"], query["numerical_rank"]) == (4.0, 6.0, 2)
    assert query["energy_rank"] == {"0.9": 2, "0.95": 2, "0.99": 2}
    expected = sum(np.sum(module.dense() ** 2) for module in small_adapter().modules.values()) ** 0.5
    assert adapter["total"] == {
        "modules": 6, "parameters": 6 * 20, "bytes": 6 * 80, "frobenius": pytest.approx(expected),
    }  # fmt: skip
