"""``loralens curve``: the table, the JSON contract, the figure."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from loralens.cli.main import main


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_table(small: Path) -> None:
    lines = run("curve", small).stdout.replace(str(small), "PATH").splitlines()
    assert lines[0] == "PATH: 6 modules; ‖ΔW−ΔW'‖/‖ΔW‖ over all of them"
    assert lines[1].split() == [
        "rank", "parameters", "peft", "file", "error", "by", "budget", "its", "ranks", "in", "few", "bits",
    ]  # fmt: skip
    assert lines[2].split()[0:2] + lines[2].split()[4:6] == [
        "2",
        "110",
        "0",
        "0",
    ]  # the module that does nothing has no second direction
    assert lines[3].split()[0:2] + lines[3].split()[4:8] == ["1", "60", "38.6", "%", "38.6", "%"]


def test_points_are_files_that_compress_writes(small: Path, tmp_path: Path) -> None:
    record = json.loads(run("curve", small, "--json").stdout)
    assert (record["source"], record["format"], record["modules"]) == (str(small), "peft", 6)
    assert [point["rank"] for point in record["points"]] == [2, 1]
    for point in record["points"]:
        for how, rule in (("uniform", ["--rank", point["rank"]]), ("budget", ["--size", point["uniform"]["bytes"]])):
            done = json.loads(run("compress", small, "--json", "--dry-run", *rule).stdout)["total"]
            assert set(point[how]) == {"ranks", "parameters", "bytes", "relative_error"}
            assert point[how]["bytes"] == done["bytes_after"]
            assert point[how]["relative_error"] == pytest.approx(done["relative_error"], abs=1e-7)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(suffix: str, small: Path, tmp_path: Path) -> None:
    file = tmp_path / f"curve.{suffix}"
    assert run("curve", small, "--plot", file, "--to", "kohya", "--dtype", "f16").exit_code == 0
    assert file.stat().st_size > 1000


def test_errors(small: Path) -> None:
    for arguments in (["nowhere"], [small, "-m", "k_prj"], [small, "--plot", "x.gif"]):
        result = run("curve", *arguments)
        assert result.exit_code == 1
        assert "\n  fix: " in result.stderr
