"""``loralens.report``: the page of paths and of objects, without a file and with one, equal to the command's."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Moments, fingerprint
from loralens.core import Moment
from tests.cli.command import Command
from tests.reporting.adapters import drawn


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    for seed, name in ((1, "first"), (2, "second")):
        loralens.save(drawn(seed), tmp_path / name)
    return [tmp_path / "first", tmp_path / "second"]


def test_without_output_nothing_is_written_and_the_result_holds_the_document(paths: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = loralens.report(paths)
    assert sorted(tmp_path.rglob("*")) == before
    assert result.written == []
    assert result.document.sections[0].key == "findings"
    assert result.to_html().startswith("<!doctype html>")
    assert result.to_markdown("pictures").startswith("# first and second\n")
    assert "(pictures/spectra-1.png)" in result.to_markdown("pictures")


@pytest.mark.slow
def test_the_page_is_that_of_the_command(paths: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    result = loralens.report(paths, output=page, markdown=True)
    assert result.written == [page, tmp_path / "page.md", tmp_path / "page_files"]
    text = page.read_bytes()
    Command().good("report", *paths, "-o", page, "--markdown", "--overwrite")
    assert page.read_bytes() == text == result.to_html().encode()
    assert (tmp_path / "page.md").read_text() == result.to_markdown("page_files")


def test_objects_are_measured_as_their_files_are(paths: list[Path]) -> None:
    of_files = loralens.report(paths).record()
    of_objects = loralens.report([loralens.load(path) for path in paths]).record()
    for read, given in zip(of_files["adapters"], of_objects["adapters"], strict=True):
        assert {**given, "path": read["path"], "label": read["label"]} == read
    assert of_objects["together"] == of_files["together"]
    assert [adapter["path"] for adapter in of_objects["adapters"]] == [str(path) for path in paths]
    assert of_objects["command"] == ""


def test_moments_are_given_as_objects(paths: list[Path]) -> None:
    adapter = loralens.load(paths[0])
    excited = {name: Moment(np.diag(10.0 ** -np.arange(module.rank)), 30) for name, module in adapter.items()}
    result = loralens.report(adapter, activations=Moments(modules=excited, fingerprint=fingerprint(adapter)))
    assert result.record()["adapters"][0]["error_on_data"] is True


def test_a_notebook_shows_the_summary_and_no_markup_of_a_name() -> None:
    name = "model.<script>alert(1)</script>"
    result = loralens.report(drawn(1, names=[name]))
    shown = result._repr_html_()
    assert shown.startswith("<p><b>adapter</b></p><p>adapter would be 26 % smaller with 99 % of the energy.")
    assert shown.count("<li>") == len(result.document.remarks) > 0
    assert "<script" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"markdown": True}, "markdown is written next to the page"),
        ({"intruders": True}, "intruders are directions of W"),
        ({"output": "page.txt"}, "a report is a .html page"),
    ],
)
def test_options_that_make_no_sense_together(paths: list[Path], options: dict[str, object], message: str) -> None:
    with pytest.raises(loralens.OptionError, match=message):
        loralens.report(paths[0], **options)
