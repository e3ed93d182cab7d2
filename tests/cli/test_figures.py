"""``--plot`` and its options, and the same keywords of `loralens.plot`: what is in the file is what was asked for."""

import io
import pickle
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from matplotlib.figure import Figure
from PIL import Image

import loralens
from loralens.charts.spec import Figure as Chart
from loralens.cli.main import main
from loralens.errors import OptionError
from loralens.verbs.pages.plot import figure_of
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


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize("suffix", slow_except(FORMATS, next(iter(FORMATS))))
def test_the_picture_has_the_format_of_its_name_and_the_dots_asked_for(suffix: str, folder: Path) -> None:
    file = folder / f"curve{suffix}"
    done = run("curve", folder / "mine", "--plot", file, "--figure-size", "6x4", "--figure-dpi", 100, "-q")
    assert done.exit_code == 0, done.output
    with Image.open(file) as picture:
        assert picture.format == FORMATS[suffix]
        assert picture.size == (600, 400)
        grey = picture.convert("L").getextrema()
    assert grey[0] < 100 < 250 < grey[1]  # dark letters on white, not a black page
    content = file.read_bytes()
    again = run("curve", folder / "mine", "--plot", file, "--figure-size", "6x4", "--figure-dpi", 100, "--overwrite")
    assert again.exit_code == 0, again.output
    assert file.read_bytes() == content


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_a_title_of_ones_own_and_none(folder: Path) -> None:
    result = loralens.similarity(folder / "mine", folder / "yours")
    assert "mine" in " ".join(texts(loralens.plot(result)))
    assert texts(loralens.plot(result, figure_title="Two of $mine$"))[0] == "Two of $mine$"
    plain = loralens.plot(result, figure_title="")
    assert not any("directions i" in text for text in texts(plain))


@pytest.mark.parametrize("verb", ["curve", "spectrum", "similarity", "nested", "many"])
def test_titles_are_names_and_not_paths(verb: str, folder: Path) -> None:
    mine, yours, third = (folder / name for name in ("mine", "yours", "third"))
    results = {
        "curve": lambda: loralens.curve(mine),
        "spectrum": lambda: loralens.spectrum(mine, yours),
        "similarity": lambda: loralens.similarity(mine, yours),
        "nested": lambda: loralens.similarity(mine),
        "many": lambda: loralens.similarity(mine, yours, third),
    }
    figure: Chart = figure_of(results[verb]())
    words = " ".join([figure.title, *(band.title for band in figure.bands), *(chart.title for chart in figure.charts)])
    assert "away" not in words
    assert "mine" in words or verb == "many"


def test_a_smaller_figure_has_smaller_letters_and_a_larger_one_the_same(folder: Path) -> None:
    result = loralens.curve(folder / "mine")
    own = loralens.plot(result)
    width, height = own.get_size_inches()
    small = loralens.plot(result, figure_size=(width / 2, height))
    large = loralens.plot(result, figure_size=(2 * width, 2 * height))
    sizes = [figure.axes[0].xaxis.label.get_fontsize() for figure in (own, small, large)]
    assert sizes[1:] == pytest.approx([sizes[0] / 2, sizes[0]])
    assert tuple(small.get_size_inches()) == pytest.approx((width / 2, height))
    widths = [figure.axes[0].lines[0].get_linewidth() for figure in (own, small)]
    assert widths[1] == pytest.approx(widths[0] / 2)


def test_a_notebook_shows_the_figure_without_pyplot(folder: Path) -> None:
    figure = loralens.plot(loralens.curve(folder / "mine"), figure_dpi=200)
    content, size = figure._repr_png_()  # type: ignore[attr-defined]
    inches = figure.get_size_inches()
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == tuple(int(200 * side) for side in inches)
    assert (size["width"], size["height"]) == tuple(round(96 * side) for side in inches)
    assert pickle.loads(pickle.dumps(figure)).get_size_inches() == pytest.approx(inches)  # ours


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--figure-dpi", 300], "give --plot too"),
        (["--figure-title", "x"], "give --plot too"),
        (["--plot", "x.png", "--figure-size", "4"], "write it like 6.5x4"),
        (["--plot", "x.png", "--figure-size", "4x"], "write it like 6.5x4"),
        (["--plot", "x.png", "--figure-size", "4x0"], "must be positive"),
        (["--plot", "x.png", "--figure-size", "nanx3"], "must be positive"),
        (["--plot", "x.png", "--figure-size", "infx3"], "must be positive"),
        (["--plot", "x.png", "--figure-dpi", "-1"], "must be positive"),
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


def test_axes_of_ones_own_keep_their_size(folder: Path) -> None:
    axes = Figure().add_subplot()
    with pytest.raises(OptionError, match="ax has a figure already"):
        loralens.plot(loralens.curve(folder / "mine"), axes, figure_size=(3, 2))


@pytest.mark.parametrize("command", ["spectrum", "curve", "compress --rank 1 --dry-run"])
def test_a_file_is_replaced_only_where_asked(command: str, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "figure.svg"
    file.write_text("mine")
    words = [*command.split(), folder / "mine", "--plot", file]
    assert f"{file}: exists\n  fix: choose another file, or give --overwrite" in Command().refused(*words)
    assert file.read_text() == "mine"
    Command().good(*words, "--overwrite")
    assert file.read_text() != "mine"
