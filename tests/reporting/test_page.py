"""The page and the Markdown as text: whole, escaped, small, and the same for the same adapters."""

import json
import re
from base64 import b64encode
from dataclasses import replace
from hashlib import sha256
from html.parser import HTMLParser

import numpy as np
import pytest
from markdown_it import MarkdownIt

from loralens import Adapter, LowRank
from loralens.analysis import run_checks
from loralens.reporting import adapter_sections as ranks
from loralens.reporting.document import PageTable, Paragraph, Report, Section, Slider
from loralens.reporting.report_files import report_html, report_markdown, report_pictures
from tests.reporting.adapters import NAMES, drawn, measured, report
from tests.reporting.reading import cells, pictures

KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def made(adapters: dict[str, Adapter]) -> Report:
    subjects = measured(adapters)
    found = run_checks([one.examination for one in subjects])
    return report(subjects, found, command="loralens report")


class Balanced(HTMLParser):
    """Checks that every element is closed where it was opened."""

    EMPTY = frozenset({"meta", "input", "br", "wbr", "link", "img"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_asks_for_nothing() -> None:
    text = report_html(made({"a": drawn(1), "b": drawn(2)}))
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    assert not parser.tags & {"img", "link", "iframe", "object", "base", "form", "a:external"}
    outside = [one for one in re.findall(r'(?:src|href)="([^"]*)"', text) if not one.startswith("#")]
    assert outside == []
    assert "url(" not in text
    assert "@import" not in text
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert "default-src 'none'" in text


def test_same_adapters_same_bytes() -> None:
    assert report_html(made({"a": drawn(1), "b": drawn(2)})) == report_html(made({"a": drawn(1), "b": drawn(2)}))
    assert report_html(made({"a": drawn(1)})) != report_html(made({"a": drawn(2)}))


def test_every_picture_says_what_it_shows_its_chance_and_its_source() -> None:
    found = made({"a": drawn(1), "b": drawn(2)})
    shown = pictures(found)
    assert len(shown) >= 12
    for one, panel in shown.values():
        assert all((one.caption, one.chance, one.source, panel.charts)), panel.key
        assert not one.chance.endswith(".")
        assert not one.source.endswith(".")
    text = report_html(found)
    # One caption for each picture, and not one for each adapter.
    assert text.count("<figcaption>") == text.count("<b>Chance:</b>") == len({one.title for one, _ in shown.values()})
    assert all(text.count(f'id="{key}"') == 1 for key in shown)
    assert len(re.findall(r"<svg (?![^>]*(aria-label|aria-hidden))", text)) == 0


def test_lone_surrogates_become_escapes() -> None:
    part = Paragraph("damaged \ud800 name")
    whole = Report("t", "", "h", [Section("k", "T", "", [part])])
    assert "damaged \\ud800 name" in report_html(whole)
    assert "damaged \\ud800 name" in report_markdown(whole, "x_files")


HOSTILE = "<script>alert(1)</script> ](javascript:x) |`*_{{7*7}}\n# head"


def test_markdown_means_nothing_by_a_name() -> None:
    name = f"model.layers.0.{HOSTILE}"
    text = report_markdown(made({HOSTILE: drawn(1, names=[name]), "b": drawn(2, names=[name])}), "x_files")
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    parser = Balanced()
    parser.feed(page)
    assert not parser.tags & {"script", "a"}
    assert page.count("<h1>") == 1
    assert "<h3>" not in page
    rows = [row for row in re.findall(r"<tr>(.*?)</tr>", page, flags=re.DOTALL) if "model.layers.0.&lt;script" in row]
    assert {row.count("<td") for row in rows} == {11}  # of the table of modules


def test_markdown_has_the_numbers_of_the_page() -> None:
    one = made({"a": drawn(1)})
    text = re.sub(r"\\(.)", r"\1", report_markdown(one, "x_files"))
    for section in one.sections:
        assert f"## {section.title}" in text
        for part in section.parts:
            if isinstance(part, PageTable):
                for line in cells(part):
                    assert "| " + " | ".join(" ".join(cell.split()) for cell in line) + " |" in text
    assert "![Singular values](x_files/spectra-1.png)" in text


def test_the_record_holds_what_the_page_says_and_no_nan() -> None:
    record = made({"a": drawn(1), "b": drawn(2)}).record
    text = json.dumps(dict(record), allow_nan=False)
    assert json.loads(text)["together"]["cosine"][0][1] == pytest.approx(record["together"]["cosine"][0][1])
    first = record["adapters"][0]
    assert [one["name"] for one in first["modules"]] == NAMES
    assert sum(one["energy_share"] for one in first["modules"]) == pytest.approx(1)
    assert first["recommended_rank"] == next(
        p["rank"] for p in sorted(first["curve"], key=lambda p: p["rank"]) if p["uniform"]["error"] ** 2 <= 0.01
    )


def keys(found: Report) -> set[str]:
    return set(pictures(found))


def table(found: Report, key: str) -> PageTable:
    return next(part for one in found.sections if one.key == key for part in one.parts if isinstance(part, PageTable))


def without(adapter: Adapter, name: str, value: float) -> Adapter:
    """The adapter with B of one module all of one value."""
    module = adapter[name]
    B = np.full_like(module.B, value)
    changed = LowRank(B, module.A, module.scale, scaling=module.scaling)
    return replace(adapter, modules={**adapter.modules, name: changed})


def test_modules_of_nan_are_left_out_and_named() -> None:
    sick = made({"a": without(drawn(1), NAMES[2], np.nan), "b": drawn(2)})
    text = report_html(sick)
    assert "not-finite" in text or "NaN" in text
    assert "Left out of everything below" in text
    assert [one["name"] for one in sick.record["adapters"][0]["modules"]] == [n for n in NAMES if n != NAMES[2]]
    assert sick.record["adapters"][0]["left_out"] == [NAMES[2]]


def test_an_adapter_that_is_all_nan_still_has_its_findings() -> None:
    adapter = drawn(1)
    for name in NAMES:
        adapter = without(adapter, name, np.nan)
    found = made({"a": adapter})
    assert "Nothing could be measured" in " ".join(found.summary)
    told = dict(cells(table(found, "identity")))
    assert (told["modules"], told["‖ΔW‖"]) == ("6 modules, 6 left out", "–")
    total = found.record["adapters"][0]["total"]
    assert (total["modules"], total["frobenius"]) == (6, None)
    report_html(found)
    report_markdown(found, "x_files")


def test_an_adapter_that_is_zero_does_nothing() -> None:
    adapter = drawn(1)
    for name in NAMES:
        adapter = without(adapter, name, 0.0)
    found = made({"a": adapter, "b": drawn(2)})
    assert "the adapter does nothing" in " ".join(found.summary)
    assert "NaN" not in re.sub(r"<script>.*?</script>", "", report_html(found), flags=re.DOTALL)
    assert found.record["adapters"][0]["recommended_rank"] is None
    assert not keys(found) & {"ranks-1", "shares-1"}
    assert keys(found) >= {"spectra-1", "energy-1", "spectra-2", "energy-2", "ranks-2", "shares-2"}
    assert keys(made({"a": adapter})) & {"spectra-1", "energy-1", "ranks-1", "shares-1"} == {"spectra-1", "energy-1"}


def test_the_spectra_count_the_modules_that_have_no_line() -> None:
    # Two of six: any other rule of counting gives another number.
    adapter = without(without(drawn(1), NAMES[0], 0.0), NAMES[3], 0.0)
    text = report_html(made({"a": adapter}))
    assert "ΔW is 0 in 2 modules: there is no line." in text
    assert ": there is no line" not in report_html(made({"a": drawn(1)}))


def test_adapters_with_nothing_in_common_are_not_compared() -> None:
    found = made({"a": drawn(1), "b": drawn(2, names=["other.w"], width=9)})
    assert "nothing was compared" in report_html(found)
    assert found.record["together"] is None


def test_different_base_models_are_told() -> None:
    other = replace(drawn(2), base_model="tiny/other")
    text = report_html(made({"a": drawn(1), "b": other}))
    assert "The adapters name different base models (a: tiny/base; b: tiny/other)." in text
    for same in (drawn(2), replace(drawn(2), base_model=None)):
        assert "different base models" not in report_html(made({"a": drawn(1), "b": same}))


def test_the_policy_allows_one_script_and_json_ends_none() -> None:
    data = {"command": "</script><!-- a&b \u2028"}
    text = report_html(Report("t", "", "h", [Section("k", "T", "", [Slider("", "", data)])]))
    carried, script = re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.DOTALL)
    assert json.loads(carried) == {"sliders": [data]}
    assert not set("<>&\u2028") & set(carried)
    assert f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}" in text


@pytest.mark.slow
def test_every_panel_has_a_file_that_the_markdown_names() -> None:
    found = made({"a": drawn(1), "b": drawn(2), "c": drawn(3)})
    keys = list(pictures(found))
    assert {"spectra-1", "energy-2", "ranks-3", "shares-1", "curve-1", "pairs", "interference", "conflicts"} < set(keys)
    files, text = report_pictures(found), report_markdown(found, "x_files")
    assert list(files) == [f"{key}.png" for key in keys]
    assert all(content.startswith(b"\x89PNG\r\n\x1a\n") for content in files.values())
    assert all(text.count(f"(x_files/{name})") == 1 for name in files)


def test_what_the_errors_of_the_ranks_are_errors_of() -> None:
    """Of ΔW, of outputs on real inputs, or of both where only some adapters have such inputs."""
    plain, output = "‖ΔW−ΔW'‖/‖ΔW‖", "√(E‖(ΔW−ΔW')x‖² / E‖ΔWx‖²) on the inputs given"
    one, other = measured({"a": drawn(1), "b": drawn(2)})
    with_inputs = [replace(subject, on_data=True, positions=7, update_error=0.25) for subject in (one, other)]
    assert ranks.ranks_section([one, other]).lead.startswith(f"The error is {plain} over all modules")
    mixed = ranks.ranks_section([one, with_inputs[1]])
    assert mixed.lead.startswith(f"The error is {output}, or {plain} without such inputs, over all modules")
    assert mixed.parts[0] == Paragraph("No activations were given for a, so their errors are those of ΔW itself.")
    said = ranks.advice(with_inputs[0])
    assert "of the squared output on the inputs given (7 positions; error " in said
    assert "; 25 % of ΔW itself)" in said
