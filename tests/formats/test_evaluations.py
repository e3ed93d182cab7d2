"""Files of evaluations: what is read back, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from loralens import FormatError
from loralens.formats.records.results import MeasuredAdapter, read_evaluation, write_evaluation

RECORD: dict[str, Any] = {
    "loralens": "1",
    "model": "base",
    "task": "classification",
    "data": "reuters",
    "texts": 160,
    "cut": [],
    "adapters": [
        {"path": "a", "parameters": 10, "loss": 0.5, "accuracy": 0.9},
        {"path": None, "parameters": None, "loss": None, "accuracy": 0.1, "note": "of a later version"},
    ],
}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    write_evaluation(RECORD, tmp_path / "e.json")
    stored = read_evaluation(tmp_path / "e.json")
    assert (stored.model, stored.task, stored.data, stored.texts) == ("base", "classification", "reuters", 160)
    assert stored.adapters == [
        MeasuredAdapter("a", 10, {"loss": 0.5, "accuracy": 0.9}),
        MeasuredAdapter(None, None, {"loss": None, "accuracy": 0.1}),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "a\x1b[2J"},
        {"task": None},
        {"data": ""},
        {"texts": "160"},
        {"texts": 10**400},
        {"adapters": []},
        {"adapters": [{"path": ["a"]}]},
        {"adapters": [{"path": "a\x1b[2J"}]},
    ],
)
def test_another_file_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "e.json").write_text(json.dumps(RECORD | change))
    with pytest.raises(FormatError, match=r"e\.json: is (not )?an evaluation") as caught:
        read_evaluation(tmp_path / "e.json")
    assert "loralens evaluate -o" in caught.value.fix
