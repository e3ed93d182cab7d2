"""Spectra against the dense definition, on adapters of every shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loralens
from loralens import LowRank, Spectrum
from loralens.analysis import measure_spectrum
from loralens.analysis.spectrum import Group, by_block, by_kind, total_norm
from tests.draws import draw_adapter, draw_factors


def spectrum_of(*s: float, shape: tuple[int, int] = (10, 10)) -> Spectrum:
    return Spectrum(np.array(s), shape, len(s))


def test_natural_order_selection_and_values() -> None:
    adapter = draw_adapter(1, {f"layers.{i}.q_proj": (9, 5) for i in (10, 2, 0)}, 3, -1.5, "f8")
    found = measure_spectrum(adapter)
    assert list(found) == ["layers.0.q_proj", "layers.2.q_proj", "layers.10.q_proj"]
    for name, one in found.items():
        np.testing.assert_allclose(one.s, np.linalg.svd(adapter[name].dense(), compute_uv=False)[:3], rtol=1e-12)
        assert (one.shape, one.rank) == ((9, 5), 3)
    assert list(measure_spectrum(adapter, modules=["*.2.*"])) == ["layers.2.q_proj"]


@given(out=st.integers(1, 9), in_=st.integers(1, 9), rank=st.integers(1, 12), scale=st.floats(-9, 9))
def test_any_shape_rank_and_scale(out: int, in_: int, rank: int, scale: float) -> None:
    module = LowRank(*draw_factors([out, in_, rank], out, in_, rank), scale)
    (one,) = measure_spectrum(loralens.Adapter(modules={"m": module})).values()
    dense = np.linalg.svd(module.dense(), compute_uv=False)[: one.s.size]
    assert one.s.shape == (min(out, in_, rank),)
    np.testing.assert_allclose(one.s, dense, atol=1e-12 * max(1.0, dense.max()))


def test_groups_share_the_energy_and_count_zero_modules() -> None:
    spectra = {
        "model.layers.0.q_proj": spectrum_of(3.0, 0.0),
        "model.layers.0.v_proj": spectrum_of(0.0, 0.0),
        "model.layers.1.q_proj": spectrum_of(2.0, 2.0),
        "lm_head": spectrum_of(2.0),
    }
    whole = total_norm(spectra.values())
    assert whole == pytest.approx(21**0.5)
    assert by_kind(spectra) == [
        Group("lm_head", 1, 2.0, pytest.approx(4 / 21), pytest.approx(1.0), 0),
        Group("q_proj", 2, pytest.approx(17**0.5), pytest.approx(17 / 21), pytest.approx(1.5), 0),
        Group("v_proj", 1, 0.0, 0.0, 0.0, 1),
    ]
    assert [(g.name, g.modules, g.zero) for g in by_block(spectra)] == [
        ("model.layers.0", 2, 1), ("model.layers.1", 1, 0), ("outside", 1, 0),
    ]  # fmt: skip
    assert sum(g.share for g in by_block(spectra)) == pytest.approx(1.0)
