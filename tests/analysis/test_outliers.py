"""Outliers: none where nothing is odd, found where several modules are, and the same in every dialect."""

import numpy as np
import pytest

from loralens import Spectrum
from loralens.analysis import find_outliers
from loralens.analysis.spectrum import distances_from_line


def test_the_line_is_that_of_theil_and_sen() -> None:
    rng = np.random.default_rng(0)
    x = 0.3 * np.arange(12) + rng.normal(size=12)
    x[[3, 8]] += 100.0
    slopes = [(x[j] - x[i]) / (j - i) for i in range(12) for j in range(i + 1, 12)]
    rest = x - np.median(slopes) * np.arange(12)
    np.testing.assert_allclose(distances_from_line(x), rest - np.median(rest), atol=1e-12)
    # Of very many modules only some pairs are compared, and the line is the same.
    straight = np.concatenate([0.01 * np.arange(1000), [50.0]])
    assert np.abs(distances_from_line(straight)[:-1]).max() < 1e-9


def healthy(rng, blocks, *, spread=0.1, shapes=1, kinds=("self_attn.q_proj", "self_attn.v_proj"), rank=8):
    """Norms that rise fourfold with depth, as those of published adapters do, and vary by ``spread`` about that."""
    spectra = {}
    for kind in kinds:
        for i in range(blocks):
            size = 64 << (i * shapes // blocks)
            s = 0.8 ** np.arange(rank) * np.exp(0.1 * rng.normal(size=rank))
            s *= np.exp(1.4 * i / blocks + spread * rng.normal()) / np.linalg.norm(s)
            spectra[f"model.layers.{i}.{kind}"] = Spectrum(np.sort(s)[::-1], (size, size), rank)
    return spectra


@pytest.mark.some(2)
@pytest.mark.parametrize("blocks", [12, 16, 24, 48])
@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_module_ten_times_as_strong_or_weak_is_found_and_nothing_else(blocks: int, factor: float) -> None:
    rng = np.random.default_rng(blocks)
    found = strays = 0
    for _ in range(12):
        spectra = healthy(rng, blocks, shapes=3 if blocks == 16 else 1)
        victim = f"model.layers.{rng.integers(blocks)}.self_attn.v_proj"
        old = spectra[victim]
        spectra[victim] = Spectrum(old.s * factor, old.shape, old.rank)
        names = {o.name for o in find_outliers(spectra)}
        found += victim in names
        strays += len(names - {victim})
    assert found >= 11
    assert strays <= 1


def test_of_few_modules_none_is_named_and_small_differences_are_none() -> None:
    few = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(5)}
    assert find_outliers(few) == []
    equal = {f"layers.{i}.q": Spectrum(np.array([1.0 + 99 * (i == 2)]), (8, 8), 1) for i in range(9)}
    (found,) = find_outliers(equal)
    assert (found.name, found.value, found.typical) == ("layers.2.q", 100.0, pytest.approx(1.0))
    near = {name: Spectrum(s.s if i != 2 else np.array([3.9]), (8, 8), 1) for i, (name, s) in enumerate(equal.items())}
    assert find_outliers(near) == []  # good adapters have modules of three times the usual norm
    assert find_outliers({name: Spectrum(np.zeros(1), (8, 8), 1) for name in equal}) == []
