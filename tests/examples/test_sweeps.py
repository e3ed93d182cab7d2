"""Sweeps of the learning rate: the best rate, what follows for a claim, and the pages drawn from kept numbers."""

import json
from math import log10
from pathlib import Path
from typing import Any

import pytest

from loralens.charts.mpl import draw_figure

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


def test_a_best_rate_at_the_end_of_the_grid_is_not_fitted() -> None:
    best = sweep({0: bowl(1e-5)}).best(0)
    assert (best.lr, best.fitted, best.edge) == (1e-4, 1e-4, True)
    diverged = sweep({0: {1e-4: 2.0, 1e-3: 1.0, 1e-2: None}}).best(0)
    assert (diverged.lr, diverged.edge) == (1e-3, True)


def test_a_cell_has_a_best_rate_if_its_neighbours_are_done() -> None:
    cell = sweep({0: bowl(1e-3), 1: {1e-3: 0.1}, 2: dict.fromkeys(RATES)})
    assert cell.seeds == [0]
    assert cell.best(1) is None
    assert cell.best(2) is None
    wider = sweep({0: bowl(1e-3), 1: bowl(1e-2), 2: bowl(1e-5)}, rates=(*RATES, 1e-1))
    assert wider.seeds == [0]  # at the others the best rate may be one that is missing
    assert wider.best(0).fitted == pytest.approx(1e-3)


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


def test_ratios_of_rates_are_those_of_the_lowest_points() -> None:
    from language.sweeps import rank_spread, rate_ratios

    ranked = [sweep({0: bowl(lowest)}, rank=rank) for rank, lowest in ((1, 4e-3 / 3), (8, 3e-3))]
    full = sweep({0: bowl(5e-4)}, targets=None, rank=None)
    assert rank_spread(ranked) == pytest.approx([2.25])
    assert rate_ratios(ranked, full) == pytest.approx([4.0])
    assert rate_ratios([], full) == rank_spread([]) == []


def regret() -> dict[str, Any]:
    """Numbers of a study in which every claim holds, made up."""
    from dataclasses import asdict

    from without_regret_study import ALL, ATTENTION, QUICK

    runs = []
    for cell in QUICK.cells:
        lowest, floor = (3e-4, 1.0) if cell.targets is None else (3e-3, 1.0)
        floor += 0.1 * (cell.targets == ATTENTION) + 0.1 * (cell.targets == ALL and cell.batch == 16)
        for seed in QUICK.seeds:
            for lr in cell.rates:
                run = {"method": "lora", "targets": cell.targets, "rank": cell.rank}
                run = {"method": "full"} if cell.targets is None else run
                loss = floor + 0.3 * (log10(lr) - log10(lowest)) ** 2
                size = {"trained": 1000 * (cell.rank or 99), "batch": cell.batch, "steps": cell.steps}
                runs.append(run | size | {"lr": lr, "seed": seed, "held_out": loss, "seconds": 1.0})
    plan = {"recipe": asdict(QUICK.recipe), "cells": [asdict(cell) for cell in QUICK.cells]}
    return json.loads(json.dumps({
        "command": "this", "machine": {"processor": "none"}, "base": {"held_out": 3.0}, "model_size": 10**6,
        "plan": plan | {"seeds": list(QUICK.seeds), "model": "m", "device": "cpu"}, "runs": runs,
        "texts": {"source": "E2E", "train": 9, "held_out": 3, "held_out_tokens": 70, "written": 0},
    }))  # fmt: skip


def test_the_claims_follow_from_the_losses() -> None:
    from language.regret_report import claims

    found = regret()
    verdicts = [claim.verdict for claim in claims(found)]
    assert verdicts == ["agrees"] * 8 + ["not decided"]  # capacity cannot be decided
    ratio = claims(found)[1].measured
    assert ratio.startswith("10 and 10 times")
    for run in found["runs"]:  # now attention is as good as the others
        if run.get("targets") == "q_proj+k_proj+v_proj+o_proj":
            run["held_out"] -= 0.1
    assert [claim.verdict for claim in claims(found)][4] == "does not agree"


def test_a_page_names_the_cells_that_are_missing(tmp_path: Path) -> None:
    from language.regret_report import claims, figure, page

    found = regret()
    whole = page(found, tmp_path / "none")
    assert "Nothing of the plan." in whole
    assert whole.startswith("    this\n")
    found["runs"] = [
        run for run in found["runs"] if run["seed"] == 0 and run["batch"] == 4 and run.get("targets") != "v_proj"
    ]
    text = page(found, tmp_path / "none")
    assert "- full fine-tuning, batches of 4, seed 1: all rates" in text
    assert "- all layers, r = 8, batches of 16, seed 0: all rates" in text
    assert "- v of all blocks, r = 1, batches of 4, seed 1: all rates" in text
    assert "batches of 4, seed 0: all rates" in text
    assert claims(found)[7].verdict == "not measured"
    assert draw_figure(figure(found)).axes
    found["runs"] = found["runs"][:1]
    assert "not measured" in page(found, tmp_path / "none")


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
