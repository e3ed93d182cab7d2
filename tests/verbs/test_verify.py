"""`loralens.verify`: an answer, the verdict on every module, and what the command prints."""

import json
from pathlib import Path

import pytest

import loralens
from loralens.errors import OptionError
from loralens.tables.text import lay_out
from tests.bases import MODULES, contents, single, tensors
from tests.cli.test_merge import done, run
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return single(tmp_path / "base", tensors())


def test_the_answer_is_yes_for_a_path_and_an_object(small: Path, base: Path, tmp_path: Path) -> None:
    loralens.merge((small, 0.5), base=base, output=tmp_path / "out")
    before = contents(tmp_path)
    for adapter in ((small, 0.5), {small_adapter(): 0.5}, [(str(small), 0.25), (small_adapter(), 0.25)]):
        result = loralens.verify(tmp_path / "out", base=base, adapter=adapter)
        assert (result.answer, result.verdict) == (True, "exact")
        assert [verdict.module for verdict in result.modules] == MODULES
    told = done("verify", tmp_path / "out", "--base", base, "--adapter", f"{small}:0.5", "--json").stdout
    assert json.loads(told) == {"loralens": loralens.__version__, **result.record()}
    assert repr(result) == "VerifyResult(exact, 6 modules)"
    assert contents(tmp_path) == before


def test_the_answer_is_no_and_the_exit_code_1(small: Path, base: Path, tmp_path: Path) -> None:
    loralens.merge(small, base=base, output=tmp_path / "out", modules=["q_proj"])
    result = loralens.verify(tmp_path / "out", base=base, adapter=small)
    assert (result.answer, result.verdict) == (False, "absent")
    words = ("verify", tmp_path / "out", "--base", base, "--adapter", small)
    shell = run(*words, "--csv")
    assert (shell.exit_code, shell.stdout) == (1, result.to_csv())
    assert [line.split(",")[0] for line in shell.stdout.splitlines()[1:]] == MODULES  # in natural order
    assert run(*words).stdout.splitlines()[2].split()[1] == "absent"  # the worst first
    assert loralens.verify(tmp_path / "out", base=base, adapter=small, modules=["q_proj"]).answer
    lines = str(lay_out(result.tables()[0], 60)).splitlines()
    assert max(map(len, lines[1:-1])) <= 60
    assert {"verdict", "gain"} <= set(lines[1].split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "nearest, stochastic, feedback"),
        ({"device": "tpu"}, "cpu, cuda or cuda:N"),
        ({"adapter": ()}, "there is no adapter"),
        ({"adapter": 3}, "is no adapter"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, small: Path, base: Path) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.verify(base, **{"base": base, "adapter": small, **options})
