"""Sweeps of the learning rate: the best rate, what follows for a claim, and the pages drawn from kept numbers."""

from math import log10
from pathlib import Path
from typing import Any

import pytest

REPORTS = Path(__file__).parents[2] / "reports"
RATES = (1e-4, 1e-3, 1e-2)


def sweep(losses: dict[int, dict[float, float | None]], **changes: Any) -> Any:
    from language.sweeps import Sweep

    settings = {"targets": "all-linear", "rank": 8, "batch": 4, "steps": 24, "rates": RATES, "trained": 100} | changes
    return Sweep(losses=losses, **settings)


def bowl(lowest: float, floor: float = 1.0) -> dict[float, float | None]:
    """Losses whose lowest point over the logarithm of the rate is known."""
    return {lr: floor + 0.3 * (log10(lr) - log10(lowest)) ** 2 for lr in RATES}


@pytest.mark.parametrize("lowest", [5e-4, 1e-3, 2.7e-3])
def test_the_best_rate_is_that_of_the_parabola(lowest: float) -> None:
    best = sweep({0: bowl(lowest)}).best(0)
    assert best.lr == 1e-3
    assert best.fitted == pytest.approx(lowest)
    assert not best.edge


def test_differences_are_those_of_one_seed() -> None:
    from language.claims import is_larger, is_no_larger
    from language.sweeps import gaps

    first = sweep({0: bowl(1e-3, 1.5), 1: bowl(1e-3, 1.1), 2: bowl(1e-3, 9)})
    second = sweep({1: bowl(1e-3, 1.0), 0: bowl(1e-3, 1.0)})
    assert gaps(first, second) == pytest.approx([0.5, 0.1])
    assert is_larger([0.5, 0.1]) == "agrees"
    assert is_larger([0.5, 0.01]) == "not decided"
    assert is_larger([0.01, -0.5]) == "does not agree"
    assert is_no_larger([0.01, -0.5]) == "agrees"
    assert is_no_larger([0.5]) == "does not agree"
    assert is_larger([]) == is_no_larger([]) == "not measured"


KEPT = [name for name in ("nlg", "without_regret") if (REPORTS / f"{name}.json").exists()]


@pytest.mark.some(1)
@pytest.mark.parametrize("name", KEPT)
def test_the_kept_page_is_that_of_the_kept_numbers(name: str, tmp_path: Path) -> None:
    module = {"nlg": "nlg_report", "without_regret": "regret_report"}[name]
    report = __import__(f"language.{module}", fromlist=["write"])
    path = report.write(report.read(REPORTS), tmp_path)
    assert path.read_text() == (REPORTS / f"{name}.md").read_text()
    assert (tmp_path / f"{name}.json").read_text() == (REPORTS / f"{name}.json").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
