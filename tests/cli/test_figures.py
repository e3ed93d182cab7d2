"""``--plot`` and its options, and the same keywords of `loralens.plot`: what is in the file is what was asked for."""

from pathlib import Path

import pytest
from PIL import Image

import loralens
from tests.cli.command import Command
from tests.marks import slow_except
from tests.reporting.adapters import drawn

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("far") / "away"
    for seed, name in enumerate(("mine", "yours", "third")):
        loralens.save(drawn(seed), folder / name)
    return folder


CALL = Command()
run, good = CALL.run, CALL.good


@pytest.mark.parametrize("suffix", slow_except(FORMATS, next(iter(FORMATS))))
def test_the_picture_has_the_format_of_its_name_and_the_dots_asked_for(suffix: str, folder: Path) -> None:
    file = folder / f"curve{suffix}"
    good("curve", folder / "mine", "--plot", file, "--figure-size", "6x4", "--figure-dpi", 100, "-q")
    with Image.open(file) as picture:
        assert picture.format == FORMATS[suffix]
        assert picture.size == (600, 400)
        grey = picture.convert("L").getextrema()
    assert grey[0] < 100 < 250 < grey[1]  # dark letters on white, not a black page
    content = file.read_bytes()
    good("curve", folder / "mine", "--plot", file, "--figure-size", "6x4", "--figure-dpi", 100, "--overwrite")
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--figure-dpi", 300], "give --plot too"),
        (["--plot", "x.png", "--figure-size", "4"], "write it like 6.5x4"),
        (["--plot", "x.png", "--figure-size", "4x0"], "must be positive"),
        (["--plot", "x.png", "--figure-size", "100x3", "--figure-dpi", "900"], "65,535 dots"),
        (["--plot", "x.gif"], ".png, .jpg, .webp, .svg or .pdf"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: list[object], said: str, folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / one if str(one).startswith("x.") else one for one in options]
    done = run("curve", folder / "mine", *paths)
    assert done.exit_code == 2
    assert said in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["spectrum", "curve", "compress --rank 1 --dry-run"])
def test_a_file_is_replaced_only_where_asked(command: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figure.svg"
    file.write_text("mine")
    words = [*command.split(), folder / "mine", "--plot", file]
    Command().refused(*words)
    assert file.read_text() == "mine"
    Command().good(*words, "--overwrite")
    assert file.read_text() != "mine"
