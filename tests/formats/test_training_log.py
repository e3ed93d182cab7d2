"""The log of a run, read again: what it says, and lines that a kill has cut short."""

from pathlib import Path

from loralens.formats.records.training import history


def test_what_a_log_says(tmp_path: Path) -> None:
    lines = (
        '{"step": 0, "evaluation": {"loss": 2.5, "accuracy": null}}',
        '{"step": 1, "loss": 2.25, "lr": 0.1}',
        '{"step": 2, "loss": null}',
        '{"step": 2, "other": {"norm": 1}}',
        "[1, 2]",
        '{"step": 2, "evaluation": {"loss": 1.5, "accuracy": 1}}',
        '{"step": 3, "lo',
    )
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    seen = history(tmp_path / "log.jsonl")
    assert seen.losses == {1: 2.25, 2: None}
    assert seen.evaluations == ((0, {"loss": 2.5, "accuracy": None}), (2, {"loss": 1.5, "accuracy": 1.0}))
    assert not history(tmp_path / "none.jsonl").evaluations
