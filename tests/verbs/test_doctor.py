"""``loralens.doctor``: findings as values, and an answer."""

from pathlib import Path

import pytest

import loralens
from tests.cli.command import Command
from tests.cli.test_doctor import small_adapter

run = Command("doctor")


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with one module that was never trained."""
    folder = tmp_path_factory.mktemp("adapters") / "turned"
    loralens.save(small_adapter(), folder)
    return folder


def test_an_object_is_examined_as_its_file_is(turned: Path) -> None:
    (finding,) = loralens.doctor(loralens.load(turned)).findings
    (other,) = loralens.doctor(turned)
    assert (finding.code, finding.module, finding.evidence) == (other.code, other.module, other.evidence)
    assert finding.adapter == str(turned)
    pair = loralens.doctor([loralens.load(turned), loralens.load(turned)])
    assert {one.adapter for one in pair.findings if one.code == "zero-update"} == {f"{turned} 1", f"{turned} 2"}


@pytest.mark.parametrize(("level", "answer"), [(None, True), ("error", True), ("warning", False), ("note", False)])
def test_the_answer_is_that_of_the_exit_code(turned: Path, level: str | None, answer: bool) -> None:
    result = loralens.doctor(turned, fail_on=level)
    assert result.answer is answer
    words = ("--fail-on", level) if level else ()
    for shown in ((), ("--json",), ("--csv",)):
        assert run.run(turned, *words, *shown).exit_code == int(not answer)
