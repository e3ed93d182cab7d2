"""The verdict at the top of the paper's report: it comes first, and its numbers are those of the kept measurements."""

import json
import re
from statistics import fmean

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "reports" / "paper_section7.md").read_text()
FOUND = json.loads((ROOT / "reports" / "paper_section7.json").read_text())
VERDICT = " ".join(TEXT.split("## ")[0].split())


def numbers(pattern: str) -> list[float]:
    found = re.search(pattern, VERDICT)
    assert found, pattern
    return [float(one) for one in found.groups()]


def test_the_page_begins_with_its_verdict() -> None:
    title, first = [line for line in TEXT.splitlines() if line][:2]
    assert title.startswith("# Section 7")
    assert first.startswith("**Two of the paper's three answers hold")
    page = (ROOT / "reports" / "paper_section7.html").read_text()
    body = page[page.index("<main>") :]
    assert re.match(r"<main>\s*<h1>[^<]*</h1>\s*<p><strong>Two of the paper", body)


def test_the_accuracies_of_the_verdict() -> None:
    means = {task: [fmean(seeds) for seeds in ranks.values()] for task, ranks in FOUND["accuracy"].items()}
    assert numbers(r"within ([\d.]+) points") == [
        pytest.approx(100 * (max(means["reuters-r8"]) - min(means["reuters-r8"])), abs=0.05)
    ]
    assert means["20newsgroups"] == sorted(means["20newsgroups"])
    assert numbers(r"every rank \(([\d.]+) to ([\d.]+)\)") == pytest.approx(means["20newsgroups"][::4], abs=6e-4)
    kept = [one["cut"]["2"] / one["whole"] for one in FOUND["truncated"].values()]
    low, high = numbers(r"keeps (\d+) to (\d+) % of its accuracy")
    assert (low, high) == (pytest.approx(100 * min(kept), abs=0.5), pytest.approx(100 * max(kept), abs=0.5))


def test_the_excess_of_the_verdict() -> None:
    excess = [
        one["excess"] for name, one in FOUND["amplification"].items() if int(re.findall(r"r=(\d+)", name)[0]) >= 4
    ]
    low, high = numbers(r"W is ([\d.]+) to ([\d.]+) times as strong")
    assert (low, high) == (pytest.approx(min(excess), abs=6e-3), pytest.approx(max(excess), abs=0.05))
