"""Rivals are found where they are, with their versions; one that is not there has a row that says why."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import rivals


def test_a_rival_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals.sys, "executable", str(broken := tmp_path / "python"))
    broken.write_text("#!/bin/sh\necho no network >&2\nexit 1\n")
    broken.chmod(0o755)
    found = rivals.rival("adaptersentry", tmp_path)
    assert found.missing == f"not measured: {rivals.REQUIREMENTS['adaptersentry']} could not be installed"
    assert "no network" in capfd.readouterr().err
    assert not (found.folder / ".ready").exists()


def test_a_rival_that_is_there_is_not_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.sys, "executable", "false")
    (tmp_path / "mergekit").mkdir()
    (tmp_path / "mergekit" / ".ready").write_text(rivals.REQUIREMENTS["mergekit"])
    found = rivals.rival("mergekit", tmp_path)
    assert not found.missing
    assert found.program("mergekit-extract-lora") == str(tmp_path / "mergekit" / "bin" / "mergekit-extract-lora")


def test_a_checkout_that_nothing_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORALENS_BENCH_AXOLOTL", raising=False)
    assert (
        rivals.checkout("axolotl").missing == "not measured: LORALENS_BENCH_AXOLOTL does not name a checkout of axolotl"
    )


def test_a_checkout_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALENS_BENCH_SD_SCRIPTS", str(tmp_path / "nowhere"))
    assert rivals.checkout("sd-scripts").missing == "not measured: LORALENS_BENCH_SD_SCRIPTS names no folder"


def test_a_checkout_has_the_version_of_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALENS_BENCH_AXOLOTL", str(tmp_path))
    assert rivals.checkout("axolotl").version == "axolotl of an unknown commit"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    dated = {"GIT_AUTHOR_DATE": "2026-02-03T00:00:00Z", "GIT_COMMITTER_DATE": "2026-02-03T00:00:00Z"}
    subprocess.run([*git, "commit", "--allow-empty", "--quiet", "-m", "first"], check=True, env=dated)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    found = rivals.checkout("axolotl")
    assert found.version == f"axolotl commit {commit[:12]} of 2026-02-03"
    assert found.python("-c", "pass") == ["env", f"PYTHONPATH={tmp_path / 'src'}", sys.executable, "-c", "pass"]
    (inner := tmp_path / "inner").mkdir()  # its commit would be that of the folder around it
    monkeypatch.setenv("LORALENS_BENCH_AXOLOTL", str(inner))
    assert rivals.checkout("axolotl").version == "axolotl of an unknown commit"


def test_a_checkout_runs_in_its_own_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALENS_BENCH_SD_SCRIPTS", str(tmp_path))
    own = tmp_path / "venv" / "bin" / "python"
    own.parent.mkdir(parents=True)
    own.touch()
    assert rivals.checkout("sd-scripts").python("a.py") == ["env", f"PYTHONPATH={tmp_path}", str(own), "a.py"]


def test_the_program_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_EXPORT_LORA", raising=False)
    assert rivals.llama_export_lora().missing.startswith("not measured: it is not on the PATH")
    monkeypatch.setenv("LLAMA_EXPORT_LORA", "/opt/llama-export-lora")
    monkeypatch.setenv("LLAMA_EXPORT_LORA_VERSION", "llama.cpp b1")
    assert rivals.llama_export_lora() == rivals.Program("/opt/llama-export-lora", "llama.cpp b1")
