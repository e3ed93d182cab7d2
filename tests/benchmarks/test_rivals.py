"""Rivals are found where they are, with their versions; one that is not there has a row that says why."""

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


def test_a_checkout_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORALENS_BENCH_SD_SCRIPTS", str(tmp_path / "nowhere"))
    assert rivals.checkout("sd-scripts").missing == "not measured: LORALENS_BENCH_SD_SCRIPTS names no folder"


def test_the_program_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("LLAMA_EXPORT_LORA", raising=False)
    assert rivals.llama_export_lora().missing.startswith("not measured: it is not on the PATH")
    monkeypatch.setenv("LLAMA_EXPORT_LORA", "/opt/llama-export-lora")
    monkeypatch.setenv("LLAMA_EXPORT_LORA_VERSION", "llama.cpp b1")
    assert rivals.llama_export_lora() == rivals.Program("/opt/llama-export-lora", "llama.cpp b1")
