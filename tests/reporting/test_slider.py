"""What the page's slider shows at its stops, beside dense recomputation and files that are written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralens.reporting.html import report_html
from loralens.tables.numbers import size
from tests.reporting.chosen import NAMES, RANK, Chosen, chosen, everywhere
from tests.reporting.reading import number
from tests.reporting.test_browser import browser as browser  # a fixture: found here by its name
from tests.reporting.test_browser import opened, pytestmark

__all__ = ["pytestmark"]

STOPS = 12  # of a budget, of 32
KILO = 1000  # bytes of a unit of the curve


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Chosen]]:
    folder = tmp_path_factory.mktemp("slider")
    report, both = chosen(folder)
    (folder / "page.html").write_text(report_html(report), encoding="utf-8")
    return folder / "page.html", both


@pytest.fixture
def page(browser: Any, made: tuple[Path, list[Chosen]]) -> Iterator[Any]:
    yield from opened(browser, made[0])


def moved(page: Any, i: int, name: str, value: int) -> dict[str, str]:
    """What one part of a slider says after it was moved."""
    return page.evaluate(
        """async ([i, name, value]) => {
          const panel = document.querySelectorAll(".slider")[i], input = panel.querySelector(`input.${name}`);
          input.value = value;
          input.dispatchEvent(new Event("input"));
          await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
          const part = panel.querySelector(`div.${name}`), told = { command: panel.querySelector("code").textContent };
          for (const key of ["value", "error", "kept", "bytes", "now", "ranks"])
            told[key] = part.querySelector(`.${key}`).textContent;
          const dot = document.querySelectorAll("#ranks .charts > svg")[i].querySelector(`.marker.${name}`);
          return { ...told, x: +dot.getAttribute("cx"), y: +dot.getAttribute("cy") };
        }""",
        [i, name, value],
    )


def compare(told: dict[str, Any], one: Chosen, ranks: dict[str, int], folder: Path) -> None:
    """All that is said of one choice of ranks."""
    error, count = one.error(ranks), one.bytes(ranks, folder)
    assert number(told["error"]) == pytest.approx(error, rel=6e-3, abs=1e-6)
    assert number(told["kept"]) == pytest.approx(1 - error**2, rel=6e-3, abs=1e-6)
    assert told["bytes"] == size(count)
    assert number(told["now"]) == pytest.approx(count / one.bytes(everywhere(RANK), folder), rel=6e-3, abs=1e-6)
    low, high = min(ranks.values()), max(ranks.values())
    assert told["ranks"] == (f"rank {low}" if low == high else f"ranks {low}–{high}")


@pytest.mark.parametrize("i", [0, 1])
def test_every_stop_of_the_rank(page: Any, made: tuple[Path, list[Chosen]], i: int, tmp_path: Path) -> None:
    one = made[1][i]
    slider = page.locator(".slider").nth(i).locator("input.rank")
    assert (slider.get_attribute("min"), slider.get_attribute("max")) == ("0", str(RANK - 1))
    (curve,) = page.evaluate(
        "(i) => [...document.querySelectorAll('#ranks .charts > svg')[i].querySelectorAll('g.line')]"
        ".filter((line) => line.dataset.n === 'one rank everywhere')"
        ".map((line) => line.querySelector('path').getAttribute('d').slice(1).split('L'))"
        ".map((points) => points.map((x) => x.split(' ').map(Number)))",
        i,
    )
    for rank in range(1, RANK + 1):
        told = moved(page, i, "rank", rank - 1)
        compare(told, one, everywhere(rank), tmp_path)
        assert told["value"] == str(rank)
        assert told["command"].endswith(f" --rank {rank}")
        assert [told["x"], told["y"]] == pytest.approx(curve[RANK - rank], abs=0.2)  # on the curve's own point
        carried = page.evaluate(f"loralens.data.adapters[{i}].rank.stops[{rank - 1}]")
        kilobytes, percent = carried["at"]
        assert kilobytes * KILO == pytest.approx(one.bytes(everywhere(rank), tmp_path), abs=1e-6)
        assert percent / 100 == pytest.approx(one.error(everywhere(rank)), rel=1e-4, abs=1e-5)


def least_error(one: Chosen, capacity: int) -> float:
    """The least error of all ranks whose factors have at most so many parameters, of all there are."""
    every = np.stack(np.meshgrid(*[np.arange(1, RANK + 1)] * len(NAMES), indexing="ij"), -1).reshape(-1, len(NAMES))
    fits = every @ [sum(one.dense[name].shape) for name in NAMES] <= capacity
    kept = np.array([[one.energy(name, rank) for rank in range(1, RANK + 1)] for name in NAMES])
    energy = sum(kept[j, every[fits][:, j] - 1] for j in range(len(NAMES)))
    return float(np.sqrt(max(1 - np.max(energy) / kept[:, -1].sum(), 0)))


@pytest.mark.parametrize("i", [0, 1])
def test_stops_of_the_budget(page: Any, made: tuple[Path, list[Chosen]], i: int, tmp_path: Path) -> None:
    one = made[1][i]
    stops = page.evaluate(f"loralens.data.adapters[{i}].budget.stops")
    budgets = [int(stop["option"].removeprefix("--parameters ")) for stop in stops]
    assert page.locator(".slider").nth(i).locator("input.budget").get_attribute("max") == str(len(stops) - 1)

    def parameters(ranks: dict[str, int]) -> int:
        return sum(ranks[name] * sum(D.shape) for name, D in one.dense.items())

    assert budgets[0] == parameters(everywhere(1))
    assert budgets[-1] == parameters(everywhere(RANK))
    uneven = 0
    for k in np.linspace(0, len(stops) - 1, STOPS).astype(int).tolist():
        budget, (kilobytes, percent) = budgets[k], stops[k]["at"]
        error, told = percent / 100, moved(page, i, "budget", k)
        ranks = dict(zip(NAMES, stops[k]["chosen"], strict=True))
        compare(told, one, ranks, tmp_path)
        assert told["value"] == f"{budget:,} parameters"
        assert told["command"].endswith(f" --parameters {budget}")
        assert kilobytes * KILO == pytest.approx(one.bytes(ranks, tmp_path), abs=1e-6)
        assert parameters(ranks) <= budget
        assert error == pytest.approx(one.error(ranks), rel=1e-4, abs=1e-5)
        for name in NAMES:  # nothing more fits
            if ranks[name] < RANK:
                assert parameters({**ranks, name: ranks[name] + 1}) > budget
        within = [rank for rank in range(1, RANK + 1) if parameters(everywhere(rank)) <= budget]
        assert error <= one.error(everywhere(max(within))) * (1 + 1e-4) + 1e-5
        total = sum(one.energy(name, RANK) for name in NAMES)
        more = [name for name in NAMES if ranks[name] < RANK]
        next_ones = [one.energy(name, ranks[name] + 1) - one.energy(name, ranks[name]) for name in more]
        best = least_error(one, budget)  # greedy is no further from it than one direction saves
        assert error**2 <= best**2 + max(next_ones, default=0.0) / total + 1e-6
        uneven += len({*ranks.values()}) > 1
    assert uneven > STOPS / 2
