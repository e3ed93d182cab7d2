"""The page in a real browser: no error, no request, and a slider that chooses what ``loralens compress`` chooses."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter
from loralens.analysis import measure_amplification
from loralens.core import LazyArray, Weight
from loralens.reporting.report_files import report_html
from loralens.reporting.subject import BaseMeasurements
from loralens.tables import percent, size
from tests.reporting.adapters import drawn, measured, report

CHROMIUM = Path(os.environ.get("LORALENS_CHROMIUM", "/usr/bin/chromium"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright"),
    pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield found
        found.close()


def written(folder: Path, adapters: dict[str, Adapter], *, base: bool = False) -> Path:
    """The page of these adapters; with ``base`` beside random weights."""
    subjects = measured(adapters)
    if base:
        subjects = [replace(one, against_base=beside(one.adapter)) for one in subjects]
    path = folder / "page.html"
    found = report(subjects, [], base="base" if base else None, command="loralens report a b")
    path.write_text(report_html(found), encoding="utf-8")
    return path


def beside(adapter: Adapter) -> BaseMeasurements:
    rng = np.random.default_rng(5)
    weights = {
        name: Weight(name, LazyArray.of(rng.standard_normal(module.shape)), False) for name, module in adapter.items()
    }
    return BaseMeasurements(amplified=measure_amplification(adapter, weights))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("report"), {"first": drawn(1), "second": drawn(2)})


@pytest.fixture
def page(browser: Any, file: Path) -> Iterator[Any]:
    yield from opened(browser, file)


def opened(browser: Any, file: Path, *, width: int = 1280, scheme: str = "light") -> Iterator[Any]:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    found = context.new_page()
    said: list[str] = []
    found.on("console", lambda message: said.append(message.text))
    found.on("pageerror", lambda error: said.append(str(error)))
    asked: list[str] = []
    found.on("request", lambda request: asked.append(request.url))
    found.goto(file.as_uri())
    yield found
    assert said == []
    assert asked == [file.as_uri()]
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_it_opens_without_error_request_or_sideways_scroll(browser: Any, file: Path, width: int, scheme: str) -> None:
    for page in opened(browser, file, width=width, scheme=scheme):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
        assert light == (scheme == "light")
        page.click("#theme")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != colour
        sizes = page.evaluate(
            "[...document.querySelectorAll('figure svg')].map((x) => x.getBoundingClientRect().width)"
        )
        assert len(sizes) > 10
        shown = page.evaluate(
            "[...document.querySelectorAll('figure')].filter((x) => !x.closest('details'))"
            ".every((x) => [...x.querySelectorAll('svg')].every((y) => y.getBoundingClientRect().height > 20))"
        )
        assert shown


CUT = (
    "[...document.querySelectorAll('.scroll, .charts, .verdicts, .verdicts td')].filter((x) => x.clientWidth"
    " && x.scrollWidth > x.clientWidth + 1).map((x) => (x.closest('section') || x).id + ' ' + x.className)"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_of_three_adapters_the_first_screen_answers_and_nothing_is_cut(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    names = [f"base_model.model.bert.encoder.layer.{k}.attention.self.{kind}" for k in range(6) for kind in "qv"]
    file = written(tmp_path, {f"reuters-r8-seed{seed}": drawn(seed, names=names) for seed in range(3)}, base=True)
    for page in opened(browser, file, scheme=scheme):
        rows = page.locator(".verdicts tbody tr")
        assert rows.count() == 3
        box = rows.last.bounding_box()
        assert box["y"] + box["height"] < 600
        assert page.locator(".headline").bounding_box()["y"] < page.locator(".verdicts").bounding_box()["y"]
        page.evaluate("document.querySelectorAll('details').forEach((x) => { x.open = true; })")
        assert page.evaluate(CUT) == []
    for page in opened(browser, file, width=400, scheme=scheme):
        # On a telephone each row is a list of its cells under their headings.
        assert not page.locator(".verdicts thead").is_visible()
        cells = page.locator(".verdicts tbody tr").first.locator("td")
        assert [cell.bounding_box()["x"] for cell in cells.all()] == [cells.first.bounding_box()["x"]] * cells.count()
        assert [text for text in page.evaluate(CUT) if "verdicts" in text] == []


MOVE = "(x, value) => { x.value = value; x.dispatchEvent(new Event('input')); }"


def test_the_slider_says_what_the_file_of_compress_is(page: Any, tmp_path: Path) -> None:
    from tests.cli.command import Command

    loralens.save(drawn(1), tmp_path / "first")
    slider = page.locator(".slider").first
    slider.locator("input").evaluate(MOVE, 3)
    command = slider.locator(".budget code").text_content()
    assert command.startswith("loralens compress first -o first-small --parameters ")
    budget = command.rpartition(" ")[2]
    args = ["compress", str(tmp_path / "first"), "-o", str(tmp_path / "small"), "--parameters", budget, "--json"]
    record = json.loads(Command().run(*args).stdout)
    written = (tmp_path / "small" / "adapter_model.safetensors").stat().st_size
    assert slider.locator(".budget .bytes").text_content() == size(written)
    after = [one["rank_after"] for one in record["modules"]]
    assert slider.locator(".budget .ranks").text_content() == f"ranks {min(after)}–{max(after)}"
    assert slider.locator(".budget .error").text_content() == percent(record["total"]["relative_error"])


def test_moving_the_rank_moves_numbers_command_and_marker(page: Any) -> None:
    slider = page.locator(".slider").first
    before = [slider.locator(f".rank .{key}").text_content() for key in ("error", "bytes")]
    marker = page.locator(".marker.rank").first.get_attribute("cx")
    page.locator(".slider input").first.fill("0")
    assert slider.locator(".rank .ranks").text_content() == "rank 1"
    assert slider.locator(".rank code").text_content() == "loralens compress first -o first-small --rank 1"
    assert [slider.locator(f".rank .{key}").text_content() for key in ("error", "bytes")] != before
    assert page.locator(".marker.rank").first.get_attribute("cx") != marker


def test_tables_sort_by_number_and_back(page: Any) -> None:
    table = page.locator("#modules table").first
    column = [one.strip() for one in table.locator("th").all_text_contents()].index("‖ΔW‖F")

    def values() -> list[float]:
        return [float(text) for text in table.locator(f"tbody tr td:nth-child({column + 1})").all_text_contents()]

    unsorted = values()
    table.locator("th button").nth(column).click()
    assert values() == sorted(unsorted, reverse=True)
    assert table.locator("th").nth(column).get_attribute("aria-sort") == "descending"
    table.locator("th button").nth(column).click()
    assert values() == sorted(unsorted)
    table.locator("th button").first.click()
    names = table.locator("tbody tr td:first-child").all_text_contents()
    assert names == sorted(names)


def test_the_filter_leaves_its_modules(page: Any) -> None:
    rows = page.locator("#modules table").first.locator("tbody tr")
    assert rows.count() == 6
    page.fill("#filter", "layers.1*q_proj")
    visible = [one for one in rows.all() if one.is_visible()]
    assert [one.locator("td").first.text_content() for one in visible] == ["model.layers.1.self_attn.q_proj"]
    assert page.locator("#filtered").text_content() == "1 of 6 modules"
    assert page.locator("#spectra svg g.line.off").count() == 10
    assert page.locator("#spectra svg rect[data-t]:not(.off)").count() == 4  # two maps of two adapters
    page.fill("#filter", "")
    assert page.locator(".off").count() == 0
    assert all(one.is_visible() for one in rows.all())


def test_hovering_shows_values(page: Any) -> None:
    page.locator("#ranks-1 rect[data-t]").first.hover()
    assert "effective rank" in page.locator("#tip").text_content()
    page.locator("[data-phi]").first.scroll_into_view_if_needed()
    page.locator("[data-phi]").first.hover()
    assert page.locator("#tip").text_content().startswith("φ(")
    svg = page.locator("#spectra-1 svg.lines").first
    svg.scroll_into_view_if_needed()
    x, y = svg.evaluate(
        "(svg) => { const d = svg.querySelector('g.line path').getAttribute('d');"
        " const [x, y] = d.slice(1).split('L')[2].split(' ');"
        " const at = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM()); return [at.x, at.y]; }"
    )
    page.mouse.move(x, y)
    told = page.locator("#tip").text_content()
    assert told.startswith("model.layers.")
    assert "direction i 3: " in told
    assert svg.locator(".near").count() == 1


HOSTILE = {  # name of a module → how it is shown
    "model.layers.0.<script>alert(1)</script>": "model.layers.0.<script>alert(1)</script>",
    'model.layers.1."><img src=x onerror=alert(2)>': 'model.layers.1."><img src=x onerror=alert(2)>',
    "model.layers.2.{{ 7*7 }}{% raw %}": "model.layers.2.{{ 7*7 }}{% raw %}",
    "model.layers.3.</script><script>alert(3)</script>": "model.layers.3.</script><script>alert(3)</script>",
    "model.layers.4.'`$|*_[x](javascript:alert(4))": "model.layers.4.'`$|*_[x](javascript:alert(4))",
    "model.layers.5.\u202eתורה 😀 \u2028 x": r"model.layers.5.\u202eתורה 😀 \u2028 x",  # escapes, as on a terminal
    "model.layers.6." + "long" * 200: "model.layers.6." + "long" * 200,
}
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def test_hostile_names_stay_text(browser: Any, tmp_path: Path) -> None:
    plain = [name for name in HOSTILE if "\u2028" not in name]  # which no file of PEFT's can hold
    adapters = {
        "<b>one</b>": drawn(1, names=list(HOSTILE)),
        "</title><script>two": drawn(2, names=plain),
        "\u202ethree\x9b": drawn(3, names=plain),
    }
    file = written(tmp_path, adapters)
    for page in opened(browser, file, width=400):
        page.on("dialog", lambda dialog: pytest.fail(dialog.message))
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        rows = page.locator("#modules table").first.locator("tbody tr")
        assert rows.locator("td:first-child").all_text_contents() == list(HOSTILE.values())
        assert not OBEYED.search(page.evaluate("document.documentElement.outerHTML"))  # commands of sliders included
        for shown in HOSTILE.values():  # what stands in the table is found by the filter
            page.fill("#filter", shown.split()[0])
            visible = [row for row in rows.all() if row.is_visible()]
            assert [row.locator("td").first.text_content() for row in visible] == [shown]
        page.fill("#filter", "")
        assert page.evaluate("document.querySelectorAll('img, b:not(figcaption b)').length") == 0
        assert page.evaluate("document.querySelectorAll('script').length") == 2
        assert page.locator(".slider").count() == 2


def test_it_prints_with_everything_open(browser: Any, file: Path) -> None:
    for page in opened(browser, file, scheme="dark"):
        closed = page.locator("details:not([open])").count()
        assert closed
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details:not([open])").count() == 0
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not page.locator("nav").is_visible()
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert page.locator("details:not([open])").count() == closed


PORTRAIT, LANDSCAPE = 703, 1031  # CSS pixels of A4 between the margins of the stylesheet


def test_no_table_is_wider_than_the_paper(browser: Any, tmp_path: Path) -> None:
    names = [f"base_model.model.model.decoder.layers.{k}.self_attention_block.q_proj" for k in range(4)]
    adapters = {f"adapter_of_a_long_name_{seed}": drawn(seed, names=names) for seed in range(3)}
    file = written(tmp_path, adapters, base=True)
    for page in opened(browser, file, width=PORTRAIT):
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        page.emulate_media(media="print")
        assert page.evaluate("document.querySelectorAll('#modules .wide').length") == 3
        for width, which in ((PORTRAIT, "section:not(:has(.wide))"), (LANDSCAPE, "section")):
            page.set_viewport_size({"width": width, "height": 900})
            ends = page.evaluate(
                f"[...document.querySelectorAll('{which} table')].map((x) => x.getBoundingClientRect().right)"
            )
            assert len(ends) > 5
            assert max(ends) <= width
            over = page.evaluate(
                f"[...document.querySelectorAll('{which} .parts > *')].filter((x) => x.scrollWidth > x.clientWidth)"
                ".length"
            )
            assert over == 0
        heads = page.evaluate("[...document.querySelectorAll('th button')].map((x) => getComputedStyle(x).display)")
        assert set(heads) == {"contents"}  # Chromium repeats no button on the next page
