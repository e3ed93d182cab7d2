"""What the doctor predicts of a merge into codes: the numbers of the merge itself, and a warning for weak updates."""

import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

import loralens
from tests.bases import MODULES, single
from tests.verbs.low_bit_bases import floats, nf4_base, pair_adapter


def findings(adapter: Any, base: Path) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for finding in loralens.doctor(adapter, base=base):
        found.setdefault(finding.code, []).append(finding)
    return found


def test_everything_that_a_certificate_says_of_codes_is_predicted(tmp_path: Path) -> None:
    """The means of the merges with many seeds are the numbers of the note."""
    base, adapter = nf4_base(tmp_path / "base"), pair_adapter()
    (note,) = findings(adapter, base)["codes-merge"]
    totals = [
        loralens.merge(adapter, base=base, bits="keep", dry_run=True, seed=seed, undo="none").certificate["total"]
        for seed in range(12)
    ]
    predicted = re.search(
        r"a gain of (\S+) and an error of (\S+) in its own directions; it asks for (\S+) steps of a code on average, "
        r"so (\S+) % of the codes change, (\S+) % are clipped, and the noise is (\S+) times the update",
        note.evidence,
    )
    assert predicted
    gain, own, moves, changed, clipped, noise = map(float, predicted.groups())
    quantities = ("gain", "subspace_error", "mean_move", "changed", "clipped", "noise")
    measured = {key: fmean(total[key] for total in totals) for key in quantities}
    assert gain == pytest.approx(measured["gain"], abs=0.01)
    assert own == pytest.approx(measured["subspace_error"], rel=0.03)
    assert moves == pytest.approx(measured["mean_move"], rel=0.001)
    assert changed / 100 == pytest.approx(measured["changed"], rel=0.02)
    assert clipped / 100 == pytest.approx(measured["clipped"], rel=0.1)
    assert noise == pytest.approx(measured["noise"], rel=0.001)


def test_weak_updates_are_warned_of_and_floats_have_no_codes(tmp_path: Path) -> None:
    base = nf4_base(tmp_path / "base")
    weak = findings(pair_adapter(1e-6), base)["codes-weak"]
    assert {finding.module for finding in weak} == set(MODULES)
    assert "codes-weak" not in findings(pair_adapter(), base)
    original = single(tmp_path / "floats", floats())
    assert not {"codes-weak", "codes-merge"} & set(findings(pair_adapter(), original))
