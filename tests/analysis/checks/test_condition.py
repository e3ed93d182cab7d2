"""Checks on the numbers alone: each with an adapter that has the disease and one that has not."""

import numpy as np
import pytest

import loralens
from loralens.analysis.damage_checks import find_non_finite, find_zero_updates
from loralens.analysis.learning_checks import (
    find_random_spectra,
    find_spikes,
    find_unused_rank,
    random_participation,
    report_outliers,
)
from loralens.analysis.loading_checks import report_reader_findings
from loralens.core import Dense, LazyArray, Structured
from tests.analysis.checks.patients import changed, healthy, patient, trained
from tests.draws import draw_factors

FIRST = "model.layers.0.self_attn.q_proj"


def first(name):
    return name == FIRST


@pytest.mark.parametrize(
    "check",
    [
        find_non_finite,
        find_random_spectra,
        report_outliers,
        report_reader_findings,
        find_spikes,
        find_unused_rank,
        find_zero_updates,
    ],
)
def test_a_healthy_adapter_has_nothing(check):
    assert list(check(patient(healthy()))) == []


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_counted_where_they_are(value):
    def spoil(B, A, scale):
        B[:2, 0] = value
        return B, A, scale

    (found,) = find_non_finite(patient(changed(healthy(), spoil, only=first)))
    assert (found.level, found.module) == ("error", FIRST)
    assert found.evidence == "B holds 2 values that are NaN or Inf, of 384"


@pytest.mark.parametrize(("b", "a", "said"), [(0, 1, "B is"), (1, 0, "A is"), (0, 0, "B and A are")])
def test_zero_factors_are_named(b, a, said):
    (found,) = find_zero_updates(patient(changed(healthy(), lambda B, A, s: (b * B, a * A, s), only=first)))
    assert (found.level, found.module, found.evidence) == ("warning", FIRST, f"{said} all zero")
    assert "loralens compress adapter -o adapter-trained --energy 1 --drop-dead" in found.fix


def test_a_product_may_be_zero_without_a_zero_factor():
    def cross(B, A, scale):
        B[:, 1:], A[0] = 0, 0
        return B, A, scale

    (found,) = find_zero_updates(patient(changed(healthy(), cross, only=first)))
    assert found.evidence == "B·A is zero"
    without = Structured(Dense(LazyArray.of(np.zeros((3, 2)))))
    (found,) = find_zero_updates(patient(loralens.Adapter(modules={"m": without})))
    assert found.evidence == "ΔW is zero"


def test_random_factors_are_told_from_trained_ones_whatever_their_norm():
    def random(rng):
        return 1e-3 * rng.normal(size=(48, 8)), 7 * rng.normal(size=(8, 40))

    (found,) = find_random_spectra(patient(healthy(make=random)))
    assert (found.level, found.code, found.module) == ("warning", "random-spectrum", None)
    assert found.evidence.startswith("8 of 8 spectra are as flat as random ones; participation ratio (at most r) of ")


def test_the_null_is_that_of_gaussian_factors():
    rng = np.random.default_rng(0)
    direct = []
    for _ in range(300):
        s = np.linalg.svd(rng.normal(size=(30, 6)) @ rng.normal(size=(6, 20)), compute_uv=False)[:6]
        direct.append(np.sum(s**2) ** 2 / np.sum(s**4))
    null = random_participation((30, 20), 6)
    assert null.mean() == pytest.approx(np.mean(direct), rel=0.02)
    assert null.std() == pytest.approx(np.std(direct), rel=0.2)
    assert (np.diff(null) >= 0).all()


def test_a_spike_is_one_direction_of_four_or_more():
    def sharpen(B, A, scale, *, energy=0.995):
        U, s, Vh = np.linalg.svd(B @ A, full_matrices=False)
        s[1:] *= s[0] * ((1 / energy - 1) / np.sum(s[1:] ** 2)) ** 0.5
        return U[:, :8] * s[:8], Vh[:8], scale

    blunt = changed(healthy(), lambda *parts: sharpen(*parts, energy=0.985), only=first)
    assert list(find_spikes(patient(blunt))) == []
    (found,) = find_spikes(patient(changed(healthy(), sharpen, only=first)))
    # Good runs end like this too, and so nothing is advised.
    assert (found.level, found.module, found.fix) == ("note", FIRST, "")
    assert found.evidence.startswith("one of 8 directions holds 99.50 % of the energy")
    assert "σ₁/σ₂ = " in found.evidence
    pairs = healthy(make=lambda rng: tuple(X[..., :3] if X.shape[0] > 8 else X[:3] for X in trained(rng, decay=0.01)))
    assert list(find_spikes(patient(pairs))) == []


def test_the_saving_is_what_truncation_at_this_energy_leaves():
    def wide(rng):
        return trained(rng, rank=16, decay=0.4)

    adapter = healthy(make=wide)
    (found,) = find_unused_rank(patient(adapter))
    before = after = 0
    for module in adapter.modules.values():
        s = np.linalg.svd(module.dense(), compute_uv=False)[:16]
        energy = np.cumsum(s**2) / np.sum(s**2)
        before += 16 * (48 + 40)
        after += (np.argmax(energy >= 0.99) + 1) * (48 + 40)
    saved = 1 - after / before
    assert saved > 0.5
    assert f"0.99 of the energy needs {100 * (1 - saved):.0f} % of the parameters" in found.evidence
    assert found.fix == "`loralens compress adapter -o adapter-e99 --energy 0.99`"
    assert found.evidence.startswith("r=16, effective rank ")


def test_rank_beyond_the_size_of_the_weight():
    def head(rng):
        return draw_factors(rng, 3, 40, 8)

    found = [one for one in find_unused_rank(patient(healthy(blocks=1, make=head))) if one.module]
    assert [one.code for one in found] == ["rank-impossible"] * 2
    assert found[0].evidence == "r = 8 for a weight of 3 × 40"
    assert found[0].fix == "train it with r = 3; `loralens compress adapter -o adapter-cut --energy 1` drops them"
