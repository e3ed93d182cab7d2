"""``loralens spectrum``: exact output on a small adapter, the JSON contract, both error exits."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter

MODULE_KEYS = {
    "name", "shape", "rank", "scale", "dtype", "singular_values", "frobenius", "spectral", "nuclear", "numerical_rank",
    "stable_rank", "effective_rank", "effective_rank_energy", "participation_ratio", "energy_rank",
}  # fmt: skip

run = Command().run


def test_json_keeps_its_contract(small: Path) -> None:
    result = run("spectrum", "--json", small)
    record = json.loads(result.stdout)
    assert record["loralens"] == loralens.__version__
    (adapter,) = record["adapters"]
    assert (adapter["path"], adapter["format"], adapter["base_model"]) == (str(small), "peft", "tiny/base")
    assert all(set(module) >= MODULE_KEYS for module in adapter["modules"])
    query = adapter["modules"][0]
    assert query["name"] == "model.layers.0.self_attn.q_proj"
    assert (query["shape"], query["rank"], query["scale"], query["dtype"]) == ([6, 4], 2, 4.0, "float32")
    assert query["singular_values"] == [4.0, 2.0]
    assert (query["spectral"], query["nuclear"], query["numerical_rank"]) == (4.0, 6.0, 2)
    assert query["energy_rank"] == {"0.9": 2, "0.95": 2, "0.99": 2}
    expected = sum(np.sum(module.dense() ** 2) for module in small_adapter().modules.values()) ** 0.5
    assert adapter["total"] == {
        "modules": 6, "parameters": 6 * 20, "bytes": 6 * 80, "frobenius": pytest.approx(expected),
    }  # fmt: skip


def test_several_adapters_and_a_negative_scale(small: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    loralens.save(small_adapter().map(lambda m: loralens.LowRank(m.B, m.A, -m.scale)), twin)
    first, second = json.loads(run("spectrum", "--json", small, twin).stdout)["adapters"]
    assert second["modules"][0]["scale"] == -4.0
    assert [m["singular_values"] for m in first["modules"]] == [m["singular_values"] for m in second["modules"]]


def test_csv_has_the_numbers_of_the_json(small: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(run("spectrum", "--csv", small).stdout)))
    modules = json.loads(run("spectrum", "--json", small).stdout)["adapters"][0]["modules"]
    assert [row["name"] for row in rows] == [module["name"] for module in modules]
    for row, module in zip(rows, modules, strict=True):
        assert [int(row["out"]), int(row["in"])] == module["shape"]
        assert float(row["effective_rank"]) == module["effective_rank"]
        assert [float(s) for s in row["singular_values"].split()] == module["singular_values"]
        assert int(row["energy_rank_0.95"]) == module["energy_rank"]["0.95"]


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
    modules = json.loads(run("spectrum", "--json", *options, small).stdout)["adapters"][0]["modules"]
    assert [module["name"].split(".")[2] for module in modules] == blocks


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such file or folder"),
        (["SMALL", "--modules", "k_prj"], "the nearest names are"),
        (["SMALL", "--alpha", "3"], "the file states its own scale"),
        (["SMALL", "--plot", "out.gif"], "out.gif"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(small: Path, arguments: list[str], message: str) -> None:
    result = run("spectrum", *(str(small) if a == "SMALL" else a for a in arguments))
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert "\n  fix: " in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_nan_in_a_factor_names_the_module(tmp_path: Path) -> None:
    def spoil(module: loralens.LowRank) -> loralens.LowRank:
        B = module.B.copy()
        B[0, 0] = np.nan
        return loralens.LowRank(B, module.A, module.scale)

    loralens.save(small_adapter().map(spoil), tmp_path / "bad")
    result = run("spectrum", tmp_path / "bad")
    assert result.exit_code == 2
    assert "model.layers.0.self_attn.q_proj" in result.stderr
    assert "NaN" in result.stderr


def test_verbose_says_once_what_the_columns_mean(small: Path) -> None:
    told, brief = run("spectrum", small, "--verbose").stdout, run("spectrum", small).stdout
    assert "stable: stable rank: Σσ²/σ₁²\n" in told
    assert "E90: directions that hold 90 % of the energy\n" in told
    assert "stable:" not in brief
    # The tables of kinds and of blocks have the same columns.
    assert told.count("energy: part of the ‖ΔW‖² of all modules chosen\n") == 1


def test_every_quantity_of_the_main_tables_is_explained(small: Path) -> None:
    """Names, counts and sizes need no explanation; other headings do."""
    plain = {
        "module",
        "and",
        "kind",
        "block",
        "side",
        "modules",
        "out × in",
        "parameters",
        "checkpoint",
        "step",
        "path",
    }
    plain |= {"#", "adapter", "in", "loss", "format", "base", "size", "note", "r", "rank", "‖W‖F", "peft file", " "}
    other = small.parent / "other"
    loralens.scale(small, by=2, output=other, overwrite=True)
    results = [
        loralens.spectrum(small),
        loralens.similarity(small),
        loralens.similarity(small, other),
        loralens.similarity(small, other, small),
        loralens.trajectory(small, other),
        loralens.curve(small),
        loralens.survey(small),
    ]
    unexplained = {
        column.title
        for result in results
        for table in result.tables()
        for column in table.shown
        if not column.about and column.title not in plain and not column.title.isdigit()
    }
    assert unexplained <= {"cosine", "share of energy", "ratio", "reason"}
