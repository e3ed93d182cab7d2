"""`loralens.unmerge`: the base back by the undo file or by subtracting, and a dry run that proves it."""

import json
from pathlib import Path

import pytest

import loralens
from loralens import OptionError
from tests.bases import contents, sharded, tensors
from tests.cli.test_merge import done
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return sharded(tmp_path / "base", tensors(size=2.0))


@pytest.fixture
def out(small: Path, base: Path, tmp_path: Path) -> Path:
    loralens.merge(small, base=base, output=tmp_path / "out")
    return tmp_path / "out"


def test_the_base_comes_back_as_on_the_command_line(base: Path, out: Path, tmp_path: Path) -> None:
    result = loralens.unmerge(out, output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert result.answer
    assert result.exact
    assert len(result.keys) == 6
    told = json.loads(done("unmerge", out, "-o", tmp_path / "back", "--overwrite", "--json").stdout)
    assert {"loralens": loralens.__version__, **result.record()} == told


@pytest.mark.parametrize("make", [lambda small: small, lambda small: small_adapter(), lambda small: [(small, 1.0)]])
def test_an_adapter_is_subtracted_as_a_path_or_an_object(make, small: Path, out: Path, tmp_path: Path) -> None:
    result = loralens.unmerge(out, output=tmp_path / "object", adapter=make(small))
    told = json.loads(done("unmerge", out, "-o", tmp_path / "back", "--adapter", small, "--json").stdout)
    assert contents(tmp_path / "object") == contents(tmp_path / "back")
    same = ("exact", "tensors", "entries", "several", "none")
    assert [result.record()[key] for key in same] == [told[key] for key in same]
    assert result.answer
    assert result.to_csv().splitlines()[0] == "merged,output,exact,tensors,entries,several,none"


def test_a_dry_run_proves_and_writes_nothing(small: Path, out: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = loralens.unmerge(out, dry_run=True)
    assert result.conclusion() == [f"Would write: the base of {out}, bit for bit."]
    assert result.record()["output"] is None
    rehearsed = loralens.unmerge(out, adapter=small, dry_run=True)
    assert contents(tmp_path) == before
    assert done("unmerge", out, "--dry-run").stdout.splitlines() == [
        *result.conclusion(),
        "",
        "6 tensors restored, the SHA-256 of each checked",
        "",
    ]
    written = loralens.unmerge(out, adapter=small, output=tmp_path / "back")
    assert rehearsed.doubt == written.doubt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no output is given for the base"),
        ({"undo": "undo.loralens", "adapter": "a", "dry_run": True}, "undo= and adapter= exclude each other"),
        ({"modules": ["q"], "dry_run": True}, "modules= goes with adapter="),
        ({"once": True, "dry_run": True}, "once=True goes with adapter="),
        ({"device": "tpu", "dry_run": True}, "cpu, cuda or cuda:N"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, out: Path) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.unmerge(out, **options)
