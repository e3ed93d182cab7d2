"""What a cosine means in words, and the doctor's finding about adapters that are practically the same."""

import numpy as np
import pytest

import loralens
from loralens.analysis.interacting_pairs import FAR, in_words
from loralens.analysis.spectrum import uniform_rank
from loralens.verbs.spectra.spectrum import KEPT
from tests.draws import draw_factors


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.998, "practically the same adapter"),
        (0.95, "do much the same"),
        (0.3, "agree in part"),
        (0.1, "little in common"),
        (-0.1, "little in common"),
        (-0.3, "oppose each other in part"),
        (-0.7, "conflict"),
        (-0.999, "practically opposites"),
    ],
)
def test_words_grow_with_the_cosine(cosine: float, words: str) -> None:
    assert words in in_words(cosine, 100 * cosine)
    if abs(cosine) < 0.99:
        assert in_words(cosine, FAR / 2) == "are no more alike than two random updates"


def pair(noise: float, factor: float = 1.0) -> tuple[loralens.Adapter, loralens.Adapter, float]:
    """An adapter, the same with noise in B, and the cosine of the two, dense."""
    rng = np.random.default_rng(5)
    first, second, dense = {}, {}, []
    for i in range(4):
        B, A = draw_factors(rng, 40 + 20 * i, 30, 4)
        B2 = factor * B + noise * rng.standard_normal(B.shape)
        first[f"layers.{i}.q"], second[f"layers.{i}.q"] = loralens.LowRank(B, A), loralens.LowRank(B2, A)
        dense.append(((B @ A).ravel(), (B2 @ A).ravel()))
    x, y = (np.concatenate(parts) for parts in zip(*dense, strict=True))
    return (
        loralens.Adapter(modules=first),
        loralens.Adapter(modules=second),
        float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)),
    )


def test_the_doctor_names_what_is_practically_the_same_adapter() -> None:
    first, second, cosine = pair(0.06)
    assert 0.997 < cosine < 0.999
    result = loralens.doctor(first, second)
    (finding,) = [finding for finding in result.findings if finding.code == "near-copy"]
    assert finding.evidence == f"practically the same adapter as adapter 1: cosine {cosine:.3f} of the updates"
    assert "adapter 2 is practically the same adapter as adapter 1" in " ".join(result.conclusion())
    assert "practically the same adapter" in loralens.similarity(first, second).conclusion()[0]


def test_the_uniform_rank_keeps_what_it_says_and_no_lower_rank_does() -> None:
    first, _, _ = pair(0.0)
    spectra = loralens.spectrum(first)
    values = np.array([spectra[name].s for name in spectra])  # one rank everywhere: a matrix
    for fraction in (0.5, 0.9, KEPT, 1.0):
        rank, kept = uniform_rank(spectra.values(), fraction)
        energies = [float((values[:, :k] ** 2).sum() / (values**2).sum()) for k in range(5)]
        assert kept == pytest.approx(energies[rank])
        assert energies[rank - 1] < fraction <= energies[rank] + 1e-9
    zero = loralens.Adapter(modules={"q": loralens.LowRank(np.zeros((5, 2)), np.ones((2, 4)))})
    assert uniform_rank(loralens.spectrum(zero).values(), 0.9) == (0, 1.0)
    assert "does nothing" in loralens.spectrum(zero).conclusion()[0]
