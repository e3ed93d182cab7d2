"""The doctor on the adapters of a folder: one by one, with the findings of each as JSON; named ones together."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import loralens
from tests.verbs.batches import files_under, lay_adapters, spoil, statuses


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two trained adapters in ``all``, and a copy of the first."""
    monkeypatch.chdir(tmp_path)
    lay_adapters(tmp_path / "all", "20newsgroups-r64-seed0", "reuters-r8-r8-seed0", "20newsgroups-r64-seed0")
    return tmp_path


def test_named_adapters_are_compared_and_those_of_a_folder_are_not(folder: Path) -> None:
    together = loralens.doctor("all/a", "all/c")
    assert any("same adapter" in finding.evidence for finding in together)
    alone = loralens.doctor("all")
    assert statuses(alone) == {"a": "done", "b": "done", "c": "done"}
    expected = [loralens.doctor(f"all/{name}").record()["findings"] for name in "abc"]
    assert [row.findings for row in alone] == expected
    assert all(expected)


def test_errors_are_told_where_the_adapters_are_only_counted(folder: Path) -> None:
    sick = load_file("all/b/adapter_model.safetensors")
    for name in list(sick)[:8]:
        sick[name] = np.full_like(sick[name], np.nan)
    save_file(sick, "all/b/adapter_model.safetensors")
    result = loralens.doctor("all")
    assert result.conclusion() == [
        "3 adapters, 2 examined and 1 not accepted.",
        "With findings of the level of --fail-on, or a more serious one: b.",
    ]
    told = [line for line in result.sentences() if "non-finite" in line]
    assert len(told) == 1
    assert told[0].startswith("b: error: non-finite: bert.encoder.layer.")


def test_the_findings_are_written_in_the_form_of_one_adapter(folder: Path) -> None:
    result = loralens.doctor("all/a", "all/b", output="found")
    assert statuses(result) == {"a": "written", "b": "written"}
    for name in "ab":
        record = json.loads((folder / "found" / f"{name}.json").read_text(encoding="utf-8"))
        assert record == {"loralens": loralens.__version__, **loralens.doctor(f"all/{name}").record()}


def test_the_answer_is_asked_again_about_what_was_found_before(folder: Path) -> None:
    assert loralens.doctor("all", output="found", fail_on="warning").answer
    before = files_under(folder / "found")
    again = loralens.doctor("all", output="found", fail_on="note")
    assert statuses(again) == {"a": "exists", "b": "exists", "c": "exists"}
    assert not again.answer
    assert [row.name for row in again.answered_no] == ["a", "b", "c"]
    assert files_under(folder / "found") == before
    assert statuses(loralens.doctor("all", fail_on="note")) == {"a": "no", "b": "no", "c": "no"}


def test_one_that_cannot_be_read_is_a_failure_and_a_finding_of_the_log(folder: Path) -> None:
    spoil(folder / "all" / "b")
    result = loralens.doctor("all", output="found", sarif="found.sarif")
    assert statuses(result) == {"a": "written", "b": "failed", "c": "written"}
    log = json.loads((folder / "found.sarif").read_text(encoding="utf-8"))
    results = log["runs"][0]["results"]
    assert [each["ruleId"] for each in results if each["level"] == "error"] == ["unreadable"]
    # The log of a run that skips is the same.
    assert statuses(loralens.doctor("all", output="found", sarif="again.sarif"))["a"] == "exists"
    assert (folder / "again.sarif").read_bytes() == (folder / "found.sarif").read_bytes()


@pytest.mark.some(3)
@pytest.mark.parametrize("content", [{}, {"level": "perfect"}, {"evidence": "\x1b[2J"}, {"more": 1}])
def test_a_file_that_holds_no_findings_is_neither_believed_nor_replaced(
    content: dict[str, object], folder: Path
) -> None:
    loralens.doctor("all", output="found")
    file = folder / "found" / "a.json"
    finding = json.loads(file.read_text(encoding="utf-8"))["findings"][0]
    file.write_text(json.dumps({"findings": [finding | content]} if content else {}), encoding="utf-8")
    before = files_under(folder / "found")
    result = loralens.doctor("all", output="found")
    assert statuses(result) == {"a": "failed", "b": "exists", "c": "exists"}
    assert "overwrite=True" in result[0].fix
    assert files_under(folder / "found") == before
    assert set(statuses(loralens.doctor("all", output="found", overwrite=True)).values()) == {"written"}
