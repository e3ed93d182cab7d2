"""``loralens.curve``: paths and objects, one result, the command's numbers."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.compression.truncation_plan import recommended_point
from loralens.tables.numbers import whole_percent
from tests.formats.files import find_adapter


@pytest.mark.parametrize("form", ["peft", "kohya"])
def test_what_an_adapter_could_save_is_one_number_in_every_command(form: str, tmp_path: Path) -> None:
    """Of the file that is there: with a head or a module that does nothing, no file of full rank is as large."""
    rng = np.random.default_rng(0)
    modules = {
        f"model.layers.{i}.self_attn.{kind}": loralens.LowRank(
            (rng.standard_normal((60, 8)) * 0.3 ** np.arange(8) * (i < 3)).astype(np.float16),
            rng.standard_normal((8, 40)).astype(np.float16),
            2.0,
        )
        for i in range(4)
        for kind in ("q_proj", "v_proj")
    }
    path = tmp_path / ("a.safetensors" if form == "kohya" else "a")
    loralens.save(loralens.Adapter(modules=modules), path, format=form)
    there = find_adapter(path).file.stat().st_size

    def saved(**rule: float) -> float:
        out = tmp_path / f"{path.stem}-out{path.suffix}"
        loralens.compress(path, output=out, overwrite=True, **rule)
        return 1 - find_adapter(out).file.stat().st_size / there

    (fix,) = [finding.fix for finding in loralens.doctor(path).findings if finding.code == "rank-unused"]
    assert fix.endswith(f" saves {whole_percent(saved(energy=0.99))} of the file")
    found = loralens.curve(path)
    assert found.bytes_before == there
    for point in found.points:
        assert point.uniform.bytes == pytest.approx(there * (1 - saved(rank=point.rank)), rel=0.01)
    best = recommended_point(found.points)
    assert best is not None
    assert f", {100 * saved(rank=best.rank):.0f} % less" in found.conclusion()[1]
    share = saved(energy=0.99)
    assert f", {100 * share:.0f} % less" in found.conclusion()[0]
    (verdict,) = loralens.report(path).record()["verdicts"]
    assert verdict["saved"] == pytest.approx(share)
