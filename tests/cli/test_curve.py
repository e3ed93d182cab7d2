"""``loralens curve``: the table, the JSON contract, the figure."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Moments, fingerprint, save_moments
from loralens.core import Moment
from tests.cli.command import Command

run, told = Command().run, Command().told


def test_points_are_files_that_compress_writes(small: Path, tmp_path: Path) -> None:
    record = told("curve", small)
    keys = {"loralens", "source", "format", "activations", "modules", "bytes_before", "by_energy", "points"}
    assert set(record) == keys
    assert (record["source"], record["format"], record["activations"]) == (str(small), "peft", None)
    assert record["modules"] == 6
    assert [point["rank"] for point in record["points"]] == [2, 1]
    for point in record["points"]:
        for how, rule in (("uniform", ["--rank", point["rank"]]), ("budget", ["--size", point["uniform"]["bytes"]])):
            done = told("compress", small, "--dry-run", *rule)["total"]
            assert set(point[how]) == {"ranks", "parameters", "bytes", "relative_error"}
            assert point[how]["bytes"] == done["bytes_after"]
            assert point[how]["relative_error"] == pytest.approx(done["relative_error"], abs=1e-7)


def test_on_data(small: Path, tmp_path: Path) -> None:
    adapter, file = loralens.load(small), tmp_path / "k.safetensors"
    moments = {name: Moment(np.diag([1e-4, 1.0]), 10) for name in adapter}
    save_moments(Moments(modules=moments, fingerprint=fingerprint(adapter)), file)
    record = told("curve", small, "--activations", file)
    assert record["activations"] == str(file)
    for point in record["points"]:
        done = run("compress", small, "--json", "--dry-run", "--rank", point["rank"], "--activations", file)
        expected = json.loads(done.stdout)["total"]
        assert set(point["uniform"]) == {"ranks", "parameters", "bytes", "data_error"}
        assert point["uniform"]["data_error"] == pytest.approx(expected["data_error"], rel=2e-3)  # ε of K
