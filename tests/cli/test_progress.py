"""A progress bar where stderr is a terminal, nothing where it is not."""

import sys

import pytest

from loralens.cli.messages import progress_bar


def test_nothing_is_drawn_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working", 10) as step:
        assert step is None
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_says_what_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("reading [the] base", 10) as step:
        assert step is not None
        step(4)
        step(6)
    out, err = capsys.readouterr()
    assert out == ""
    assert "reading [the] base" in err
    assert "left" in err
