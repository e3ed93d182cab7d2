"""Commands take turns; what does not count is the first run, or a smaller one in its place."""

from pathlib import Path

import pytest

from benchmarks.process import alternate_writers, once


def test_commands_take_turns_in_empty_folders(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def command(name: str, word: str) -> list[str]:
        return ["sh", "-c", f"echo {name} {word} $(ls {tmp_path / name}) >> {log}; touch {tmp_path / name / 'out'}"]

    timed, warm = ({name: command(name, word) for name in ("a", "b")} for word in ("timed", "warm"))
    judged = []

    def judge(name: str) -> dict[str, float]:
        judged.append(log.read_text().split("\n")[-2])
        assert (tmp_path / name / "out").exists()
        return {"error": 0.5}

    found = alternate_writers(timed, runs=2, warm=warm, folder=tmp_path, judge=judge)
    assert log.read_text().split("\n") == ["a warm", "b warm", "a timed", "b timed", "a timed", "b timed", ""]
    assert judged == ["a timed", "b timed"]
    assert found["a"]["error"] == 0.5
    assert found["a"]["runs"] == 2
    assert not (tmp_path / "b").exists()


def test_a_command_that_fails_is_told_with_its_complaint() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)sh -c.*no such thing"):
        once(["sh", "-c", "echo no such thing >&2; exit 3"])
