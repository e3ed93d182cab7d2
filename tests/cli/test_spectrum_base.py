"""``loralens spectrum --base``: ΔW beside W in the table, JSON and CSV; nothing of it without."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.test_amplify import run, small_base
from tests.conftest import small_adapter

KEYS = {"weight_frobenius", "weight_spectral", "weight_spectral_error", "relative_frobenius", "relative_spectral"}


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


def test_json_and_csv(small: Path, base: Path) -> None:
    record = json.loads(run("spectrum", small, "--base", base, "--json", "--top", "2").stdout)
    assert record["base"] == str(base)
    modules = record["adapters"][0]["modules"]
    assert len(modules) == 2
    assert modules[0]["weight_frobenius"] == pytest.approx(85**0.5)
    assert (modules[0]["weight_spectral"], modules[0]["weight_spectral_error"]) == (pytest.approx(8), 0)
    assert modules[0]["relative_frobenius"] == pytest.approx((20 / 85) ** 0.5)
    assert modules[0]["relative_spectral"] == pytest.approx(0.5)
    (row, _) = csv.DictReader(io.StringIO(run("spectrum", small, "--base", base, "--csv", "--top", "2").stdout))
    assert {key: float(row[key]) for key in KEYS} == {key: modules[0][key] for key in KEYS}
    plain = json.loads(run("spectrum", small, "--json").stdout)
    assert "base" not in plain
    assert not KEYS & set(plain["adapters"][0]["modules"][0])
    (row, *_) = csv.DictReader(io.StringIO(run("spectrum", small, "--csv").stdout))
    assert not KEYS & set(row)


def test_a_weight_of_zero_has_no_share(small: Path, tmp_path: Path) -> None:
    save_file({f"{name}.weight": np.zeros((6, 4), np.float32) for name in small_adapter()}, tmp_path / "m.safetensors")
    module = json.loads(run("spectrum", small, "--base", tmp_path, "--json").stdout)["adapters"][0]["modules"][0]
    assert (module["weight_frobenius"], module["relative_frobenius"], module["relative_spectral"]) == (0, None, None)
    assert run("spectrum", small, "--base", tmp_path).exit_code == 0
