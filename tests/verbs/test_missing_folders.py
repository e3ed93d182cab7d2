"""Every verb and function that writes makes the folders on the way to its target; a dry run makes none."""

from collections.abc import Callable
from pathlib import Path

import pytest

import loralens
from loralens.charts.figure_file import save_figure
from loralens.verbs.pages.plot import figure_of
from tests.bases import single, tensors
from tests.conftest import small_adapter


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder with an adapter, and with a base that it fits."""
    loralens.save(small_adapter(), tmp_path / "a")
    single(tmp_path / "base", tensors())
    return tmp_path


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    "save a folder": lambda files, out: loralens.save(loralens.load(files / "a"), out),
    "save a file": lambda files, out: loralens.save(loralens.load(files / "a"), out / "x.safetensors"),
    "save a pickle": lambda files, out: loralens.save(loralens.load(files / "a"), out / "x.bin", format="loralib"),
    "compress": lambda files, out: loralens.compress(files / "a", rank=1, output=out / "x.safetensors"),
    "convert": lambda files, out: loralens.convert(files / "a", to="kohya", output=out / "x.safetensors"),
    "scale": lambda files, out: loralens.scale(files / "a", 2, output=out / "x.safetensors"),
    "drop": lambda files, out: loralens.drop(files / "a", [next(iter(small_adapter()))], output=out / "x.safetensors"),
    "merge": lambda files, out: loralens.merge(files / "a", base=files / "base", output=out),
    "records of a merge": lambda files, out: loralens.merge(
        files / "a",
        base=files / "base",
        output=files / "merged",
        undo=out / "undo" / "x.safetensors",
        certificate=out / "certificate" / "x.json",
    ),
    "report": lambda files, out: loralens.report(files / "a", output=out / "x.html", markdown=True),
    "log of findings": lambda files, out: loralens.doctor(files / "a", sarif=out / "x.sarif"),
    "figure": lambda files, out: save_figure(figure_of(loralens.spectrum(files / "a")), out / "x.svg"),
}


@pytest.mark.some(2)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_folders_on_the_way_are_made(write: Callable[[Path, Path], object], files: Path) -> None:
    write(files, files / "new" / "deep" / "out")
    assert [path for path in (files / "new" / "deep" / "out").rglob("*") if path.is_file()]
    assert not [path for path in files.rglob("*") if path.name.startswith(".")]


def test_a_dry_run_makes_no_folder(files: Path) -> None:
    loralens.compress(files / "a", rank=1, output=files / "new" / "x.safetensors", dry_run=True)
    loralens.merge(files / "a", base=files / "base", output=files / "new" / "merged", dry_run=True)
    assert not (files / "new").exists()


@pytest.mark.parametrize("in_the_way", ["file", "link"])
def test_a_path_that_cannot_become_a_folder_is_refused_before_the_work(in_the_way: str, files: Path) -> None:
    (files / "file").touch()
    (files / "link").symlink_to("nowhere")
    for write in (WRITERS["compress"], WRITERS["merge"], WRITERS["records of a merge"], WRITERS["report"]):
        with pytest.raises(loralens.OptionError, match=f"{in_the_way}: is a "):
            write(files, files / in_the_way / "deep")
