"""``loralens curve``: the table, the JSON contract, the figure."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.stored import Moment, Moments
from loralens.formats.records.results import save_moments
from tests.cli.command import Command
from tests.conftest import small_adapter

run = Command().run


def test_points_are_files_that_compress_writes(small: Path, tmp_path: Path) -> None:
    record = json.loads(run("curve", small, "--json").stdout)
    assert set(record) == {"loralens", "source", "format", "activations", "modules", "bytes_before", "points"}
    assert (record["source"], record["format"], record["activations"]) == (str(small), "peft", None)
    assert record["modules"] == 6
    assert [point["rank"] for point in record["points"]] == [2, 1]
    for point in record["points"]:
        for how, rule in (("uniform", ["--rank", point["rank"]]), ("budget", ["--size", point["uniform"]["bytes"]])):
            done = json.loads(run("compress", small, "--json", "--dry-run", *rule).stdout)["total"]
            assert set(point[how]) == {"ranks", "parameters", "bytes", "relative_error"}
            assert point[how]["bytes"] == done["bytes_after"]
            assert point[how]["relative_error"] == pytest.approx(done["relative_error"], abs=1e-7)


def test_a_dialect_of_one_rank(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    modules = {
        f"model.layers.{i}.self_attn.{kind}": loralens.LowRank(
            (rng.standard_normal((16, 4)) * np.logspace(0, -1 - i, 4)).astype(np.float32),
            rng.standard_normal((4, 12)).astype(np.float32),
            2.0,
        )
        for i in range(2)
        for kind in ("q_proj", "v_proj")
    }
    loralens.save(Adapter(modules=modules, base_model="tiny"), tmp_path / "mlx", format="mlx")
    record = json.loads(run("curve", tmp_path / "mlx", "--json").stdout)
    assert [point["uniform"]["ranks"] for point in record["points"]] == [[4, 4], [3, 3], [2, 2], [1, 1]]
    assert all(point["budget"] == point["uniform"] for point in record["points"])
    arguments = ["-o", tmp_path / "out", "--rank", 2, "--uniform", "--plot", tmp_path / "curve.png"]
    assert run("compress", tmp_path / "mlx", *arguments).exit_code == 0


def test_errors(small: Path) -> None:
    for arguments in (["nowhere"], [small, "-m", "k_prj"], [small, "--plot", "x.gif"]):
        result = run("curve", *arguments)
        assert result.exit_code == 2
        assert "\n  fix: " in result.stderr


def test_on_data(small: Path, tmp_path: Path) -> None:
    adapter, file = loralens.load(small), tmp_path / "k.safetensors"
    moments = {name: Moment(np.diag([1e-4, 1.0]), 10) for name in adapter}
    save_moments(Moments(modules=moments, fingerprint=fingerprint(adapter)), file)
    record = json.loads(run("curve", small, "--json", "--activations", file).stdout)
    assert record["activations"] == str(file)
    for point in record["points"]:
        done = run("compress", small, "--json", "--dry-run", "--rank", point["rank"], "--activations", file)
        expected = json.loads(done.stdout)["total"]
        assert set(point["uniform"]) == {"ranks", "parameters", "bytes", "data_error"}
        assert point["uniform"]["data_error"] == pytest.approx(expected["data_error"], rel=2e-3)  # ε of K
    shown = run("curve", small, "--activations", file, "--plot", tmp_path / "curve.png").stdout
    assert "on the data" in shown
    assert (tmp_path / "curve.png").stat().st_size > 1000
    twin = tmp_path / "twin"
    loralens.save(small_adapter().map(lambda m: m.rescaled(2.0, m.scaling)), twin)
    assert "belong to another adapter" in run("curve", twin, "--activations", file).stderr
