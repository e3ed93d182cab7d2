"""A progress bar where stderr is a terminal, nothing where it is not."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner

from loralens import LowRank, save
from loralens.cli.main import main
from loralens.cli.messages import progress_bar
from loralens.verbs.models.loaded import Loaded
from loralens.verbs.models.texts import InputText
from tests import models
from tests.bases import single, tensors
from tests.conftest import small_adapter


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


LONG = {
    "spectrum": ["spectrum", "{a}"],
    "similarity of one": ["similarity", "{a}"],
    "similarity": ["similarity", "{a}", "{b}"],
    "similarity of many": ["similarity", "{a}", "{b}", "{c}"],
    "trajectory": ["trajectory", "{a}", "{b}", "{c}"],
    "survey": ["survey", "{folder}"],
    "equal": ["equal", "{a}", "{a}"],
    "doctor": ["doctor", "{a}", "{b}"],
    "compress": ["compress", "{a}", "--rank", "1", "--dry-run"],
    "curve": ["curve", "{a}"],
    "intruders": ["intruders", "{a}", "--base", "{base}", "--no-cache"],
    "amplify": ["amplify", "{a}", "--base", "{base}"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("long")
    adapter = small_adapter()
    for name, factor in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        changed = adapter.map(lambda m, f=factor: LowRank(f * m.B, m.A, m.scale, scaling=m.scaling))
        save(changed, folder / name)
    base = single(folder / "base", tensors(np.float32))
    return {"folder": str(folder), "base": str(base), **{name: str(folder / name) for name in "abc"}}


@pytest.mark.parametrize("name", LONG)
def test_long_commands_say_how_far_they_are_and_end_at_the_end(
    name: str, made: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def watched(label: str, total: int) -> Iterator[Callable[[int], None]]:
        bars.append((label, total, []))
        yield bars[-1][2].append

    monkeypatch.setattr("loralens.cli.messages.progress_bar", watched)
    done = CliRunner().invoke(main, [word.format(**made) for word in LONG[name]])
    assert done.exit_code == 0, done.output
    assert bars
    for label, total, steps in bars:
        assert total > 1
        assert sum(steps) == total, label


def test_the_texts_that_a_model_has_seen_are_counted() -> None:
    pytest.importorskip("transformers")
    told: list[int] = []
    loaded = Loaded(models.bert(), models.tokenizer(), head="")
    assert len(list(loaded.batches([InputText("cat", None)] * 5, batch=2, length=4, step=told.append))) == 3
    assert told == [2, 2, 1]
