"""What the documents say in words about numbers, against the numbers."""

import re
from pathlib import Path

import numpy as np

import loralens
from loralens.arithmetic import METHODS
from tests.conftest import ROOT


def test_what_the_page_of_the_paper_says_of_the_side_of_a_alone(real: Path) -> None:
    text = " ".join((ROOT / "docs" / "paper.md").read_text("utf-8").split())
    told = r"φ\(1, 1\) is (0\.\d+) and (0\.\d+) on these two modules, and (0\.\d+) in the median of all (\d+)"
    words = re.search(told, text)
    assert words
    pair = [loralens.load(real / f"sam-vitb-rank{rank}") for rank in (8, 16)]
    first = {name: float(one.overlap.phi[0, 0]) for name, one in loralens.similarity(*pair, of="A").items()}
    shown = [value for name, value in first.items() if name.endswith(("w_012", "w_013"))]
    assert [f"{value:.2f}" for value in (*shown, np.median(list(first.values())))] == list(words.groups()[:3])
    assert len(first) == int(words[4])


def test_a_dare_that_is_cut_back_to_a_rank_is_not_the_sum_on_average() -> None:
    """So no list of methods may call it that."""
    rng = np.random.default_rng(0)
    pair = []
    for _ in range(2):
        B, A = np.linalg.qr(rng.normal(size=(64, 4)))[0] * 0.7 ** np.arange(4), rng.normal(size=(4, 64))
        pair.append((loralens.Adapter(modules={"m": loralens.LowRank(B.astype("f"), A.astype("f"))}), 1.0))
    total = sum(adapter["m"].dense() for adapter, _ in pair)
    gains = []
    for seed in range(12):
        written = loralens.combine(pair, method="dare", density=0.1, strength=1.0, seed=seed).adapter["m"].dense()
        gains.append(float((written * total).sum() / (total**2).sum()))
    mean, error = np.mean(gains), np.std(gains, ddof=1) / len(gains) ** 0.5
    assert mean < 1 - 3 * error
    assert "on average" not in METHODS["dare"].text
