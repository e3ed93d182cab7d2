"""`loralens.merge`: adapters as paths, objects, pairs and mappings; results that are what the command prints."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import OptionError
from tests.bases import MODULES, contents, single, stored, tensors
from tests.cli.test_merge import CERTIFICATE, UNDO, check, done, expected
from tests.conftest import small_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return single(tmp_path / "base", tensors())


def test_a_path_and_an_object_are_merged_alike(small: Path, base: Path, tmp_path: Path) -> None:
    result = loralens.merge(small, base=base, output=tmp_path / "out")
    done("merge", small, "--base", base, "-o", tmp_path / "shell")
    assert contents(tmp_path / "out") == contents(tmp_path / "shell")
    assert result.record() == json.loads((tmp_path / "out" / CERTIFICATE).read_text())
    loralens.merge(loralens.load(small), base=str(base), output=str(tmp_path / "object"))
    check(stored(tmp_path / "object"), stored(tmp_path / "out"))
    certificate = json.loads((tmp_path / "object" / CERTIFICATE).read_text())
    assert certificate["adapters"] == result.certificate["adapters"]


def test_weights_are_pairs_or_a_mapping(small: Path, base: Path, tmp_path: Path) -> None:
    adapter = small_adapter()
    for name, adapters in {
        "pairs": [(small, 0.75), (adapter, -0.25)],
        "list": [[(small, 0.75), (adapter, -0.25)]],
        "mapping": [{small: 0.75, adapter: -0.25}],
        "mixed": [{small: 0.75}, (adapter, np.float32(-0.25))],
        "once": [(str(small), 0.5)],
    }.items():
        loralens.merge(*adapters, base=base, output=tmp_path / name)
        check(stored(tmp_path / name), expected(tensors(), 0.5))


def test_a_dry_run_measures_everything_and_writes_nothing(small: Path, base: Path, tmp_path: Path) -> None:
    before = contents(tmp_path)
    result = loralens.merge(small, base=base, dry_run=True)
    assert contents(tmp_path) == before
    assert [module.fidelity.module for module in result.modules] == MODULES
    written = loralens.merge(small, base=base, output=tmp_path / "out")
    assert result.record()["modules"] == written.record()["modules"]
    assert result.tables()[0].records() == written.record()["modules"]


def test_what_is_measured_without_a_certificate(small: Path, base: Path, tmp_path: Path) -> None:
    without = {"base": base, "undo": "none", "certificate": Path("none")}
    result = loralens.merge(small, output=tmp_path / "a", **without)
    assert (list(result.modules), result.measured) == ([], False)
    assert result.conclusion() == [
        f"Wrote {tmp_path / 'a'}: {base} with {small} merged in, 6 tensors changed.",
        "How much of the update arrived was not measured, as there is no certificate.",
    ]
    result = loralens.merge(small, output=tmp_path / "b", measure=True, **without)
    assert len(result.modules) == 6
    assert not {UNDO, CERTIFICATE} & set(contents(tmp_path / "b"))


def test_the_listing_of_the_shell_is_that_of_the_result(small: Path, base: Path, tmp_path: Path) -> None:
    result = loralens.merge(small, base=base, dry_run=True)
    assert done("merge", small, "--base", base, "--dry-run", "--csv").stdout == result.to_csv()
    assert set(result.to_csv().splitlines()[0].split(",")) == set(result.record()["modules"][0])
    unwritten = ("--undo", "none", "--certificate", "none", "--csv")
    assert done("merge", small, "--base", base, "-o", tmp_path / "out", *unwritten).stdout == result.to_csv()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no output is given for the merged model"),
        ({"rounding": "up", "dry_run": True}, "nearest, stochastic, feedback"),
        ({"dtype": "int8", "dry_run": True}, "keep, f32, bf16, f16"),
        ({"device": "tpu", "dry_run": True}, "cpu, cuda or cuda:N"),
        ({"modules": ["nothing"], "dry_run": True}, "no module matches 'nothing'"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, small: Path, base: Path) -> None:
    with pytest.raises(OptionError, match=message):
        loralens.merge(small, base=base, **options)


def test_what_a_program_is_told(small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Warnings are records of a logger; an edit of names is a note, for who asks for notes."""
    renamed = {key.removeprefix("model."): array for key, array in tensors().items()}
    with caplog.at_level(logging.INFO, "loralens"):
        loralens.merge(small, base=single(tmp_path / "renamed", renamed), dry_run=True)
    assert [record.getMessage() for record in caplog.records] == ["6/6 modules match after dropping 'model.'"]
    caplog.clear()
    faint = small_adapter().map(lambda module: loralens.LowRank(module.B, module.A, 1e-4))
    loralens.merge(faint, base=single(tmp_path / "base", tensors()), dry_run=True)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "rounding to bfloat16 damages 5 of 6 updates" in record.getMessage()
