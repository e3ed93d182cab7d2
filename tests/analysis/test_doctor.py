"""The whole of doctor: order, the table of checks, and what it says of adapters that people published."""

import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.analysis.diagnosis import LEVELS
from loralens.analysis.doctor import CHECKS, diagnosis_codes
from loralens.core import Finding
from tests.analysis.checks.patients import base, changed, diagnose, healthy
from tests.draws import draw_basis


def sick():
    """NaN in one module, nothing in another, a note and an error of the reader."""
    adapter = changed(healthy(), lambda B, A, s: (0 * B, A, s), only=lambda name: ".0." in name)
    adapter = changed(adapter, lambda B, A, s: (np.nan * B, A, s), only=lambda name: ".1." in name)
    findings = (Finding("note", "dora", "a note"), Finding("error", "rank-disagrees", "an error", "a fix"))
    return loralens.Adapter(modules=adapter.modules, findings=findings)


def test_most_serious_first_then_in_the_order_of_the_checks():
    found = diagnose({"a": sick(), "b": healthy(5)})
    assert [one.code for one in found] == [
        "non-finite", "non-finite", "rank-disagrees", "zero-update", "zero-update", "dora", "rank-unused",
    ]  # fmt: skip
    assert {one.adapter for one in found} == {"a"}
    assert [LEVELS.index(one.level) for one in found] == sorted(LEVELS.index(one.level) for one in found)


def test_a_diagnosis_does_not_depend_on_the_gauge():
    rng = np.random.default_rng(3)

    def turn(B, A, scale):
        G = draw_basis(rng, 8, 8)
        return 7 * B @ G, G.T @ A / 7, scale

    weak = healthy(2)
    bed = base(weak, ratio=0.003, dtype=ml_dtypes.bfloat16)
    first, second = (diagnose({"a": one}, base=bed) for one in (weak, changed(weak, turn)))
    assert [(one.code, one.module) for one in first] == [(one.code, one.module) for one in second]
    assert first


def test_the_page_has_a_row_for_every_code():
    page = (Path(__file__).parents[2] / "docs" / "commands" / "doctor.md").read_text("utf-8")
    first_cells = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    rows = {code for cell in first_cells for code in re.findall(r"`([a-z-]+)`", cell)}
    assert {code for check in CHECKS for code in check.codes} - rows == set()


def test_every_warning_has_earned_its_level_by_figures():
    """The table of examples/doctor_figures.py: ten cases at least, nine of ten right, real and injected apart."""
    page = (Path(__file__).parents[2] / "reports" / "doctor_figures.md").read_text("utf-8")
    figures = page.partition("<!-- figures")[2].partition("<!-- end")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in figures.splitlines() if "| `" in line]
    assert {row[0] for row in rows} >= set(diagnosis_codes())
    for code, level, *cells, _ in rows:
        right, raised = zip(
            *(tuple(map(int, cell.split(" of "))) if " of " in cell else (0, 0) for cell in cells), strict=True
        )
        if level != "note":
            assert all(r >= 0.9 * n for r, n in zip(right, raised, strict=True)), code
            assert sum(raised) >= 10, code


# folder → codes, with how many modules each names; what is not here is well
REAL = {
    "bertbase-rslora-epoch2": {},
    "bloom560m-mergedlinear": {},
    "flux-aitoolkit-r16": {"alpha-folded": 0, "rank-unused": 0},
    "gemma270m-aowei-main": {},
    "gpt2-emotion-anirudh": {"rank-unused": 0},
    "labram-eeg-partialzero": {"zero-update": 12, "foreign-code": 0, "rank-impossible": 1},
    "minilm-souravt-ckpt750": {"spike": 3, "rank-unused": 0},
    "opt125m-bf16-r16": {},
    "qwen05b-mlx-100": {},
    "qwen05b-peft-r8": {},
    "roberta-mnli-loralib": {"alpha-unknown": 0, "spike": 1},
    "sam-vitb-rank16": {"names-unknown": 0, "rank-unused": 0},
    "sd15-timohavdk-kohya": {"client": 0, "alpha-missing": 0},
}


@pytest.mark.parametrize("name", REAL)
def test_published_adapters_are_not_alarmed_about(name: str, real: Path) -> None:
    found = diagnose({name: loralens.load(real / name, strict=False)})
    counts = {code: len({one.module for one in found if one.code == code} - {None}) for code in (o.code for o in found)}
    assert counts == REAL[name]
    # A prefix of its names stands twice, so that neither ComfyUI nor sd-scripts has them.
    assert {one.code for one in found if one.level == "error"} == ({"client"} if "client" in REAL[name] else set())


def test_published_adapters_among_each_other(real: Path) -> None:
    names = ["gemma270m-aowei-main", "gemma270m-zouhe0", "sd15-timohavdk-diffusers", "sd15-timohavdk-kohya"]
    found = diagnose({name: loralens.load(real / name) for name in names})
    said = {(one.code, one.adapter) for one in found if one.code in ("shared-initialisation", "combination")}
    assert said == {
        ("shared-initialisation", names[0]), ("shared-initialisation", names[2]), ("combination", names[3]),
    }  # fmt: skip
