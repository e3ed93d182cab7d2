"""What `merge --bits keep` and `verify` say about the error of each rounding, against sums over the stored codes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from tests.bases import MODULES
from tests.verbs.low_bit_bases import decode, nf4_base, pair_adapter, stored, unpack


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return nf4_base(tmp_path / "base")


def merged(base: Path, size: float, rounding: Any) -> Any:
    return loralens.merge(pair_adapter(size), base=base, output=base.parent / "out", bits="keep", rounding=rounding)


def error_in_codes(base: Path, out: Path, size: float) -> float:
    """‖Q − W − ΔW‖/‖ΔW‖ over all modules, from the stored codes."""
    before, after, adapter = stored(base), stored(out), pair_adapter(size)
    lost = energy = 0.0
    for name in MODULES:
        W, Q = (decode(unpack(held[f"{name}.weight"]), before[f"{name}.weight.absmax"]) for held in (before, after))
        D = adapter[name].dense()
        lost, energy = lost + float(np.sum((Q - W - D) ** 2)), energy + float(np.sum(D**2))
    return (lost / energy) ** 0.5


@pytest.mark.parametrize(
    ("rounding", "words"),
    [("stochastic", "by stochastic rounding."), ("nearest", "by rounding to the nearest code.")],
)
def test_the_noise_is_the_error_that_was_measured(base: Path, rounding: str, words: str) -> None:
    result = merged(base, 1e-3, rounding)
    arrived, changed = result.conclusion()[1:]
    assert arrived.endswith(words)
    told = re.search(r"the noise is (\S+) times the update", changed)
    assert told
    assert float(told[1]) == pytest.approx(error_in_codes(base, base.parent / "out", 1e-3), rel=1e-3)


def test_rounding_to_the_nearest_code_is_told_with_the_way_out(base: Path) -> None:
    result = merged(base, 1e-4, "nearest")
    (changed,) = [sentence for sentence in result.conclusion() if "codes changed" in sentence]
    assert re.search(r"^[0-9.]+ % of the codes changed, [0-9.]+ % were clipped", changed)
    assert f"{len(MODULES)} damaged (gain < 0.8 or error > 15)" in result.tables()[0].title
    result = loralens.verify(base.parent / "out", base=base, adapter=pair_adapter(1e-4), rounding="nearest")
    assert "rounding to the nearest code takes the update" in result.conclusion()[0]
    assert "leave out --rounding nearest" in result.sentences()[0]
    assert "dtype" not in " ".join([*result.conclusion(), *result.sentences()])


def test_a_weak_update_is_sent_beside_the_base(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    merged(base, 2e-5, "stochastic")
    assert "are weak compared" in caplog.text
    assert "serve the adapter unmerged" in caplog.text
