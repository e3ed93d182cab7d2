"""The page of the study of methods on a language model, drawn from made-up numbers."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from loralens.charts.mpl import draw_figure

PHI = {f"{name}_{which}": 0.25 for name in ("phi", "chance") for which in ("1_1", "4_4", "all")}
SIZES = {"full": 1000, "bitfit": 20, "prefix": 30, "bottleneck": 40}


def numbers() -> dict[str, Any]:
    """Numbers of a study that is done; the middle rate of every grid is the best one."""
    from nlg_study import KINDS, QUICK

    runs = []
    for method, rates in QUICK.rates.items():
        for rank in QUICK.ranks if method == "lora" else [None]:
            tried = [(lr, 0) for lr in rates] if rank in (None, 8) else [(rates[1], 0)]
            for lr, seed in [*tried, (rates[1], 1)]:
                run = {"method": method, "lr": lr, "seed": seed, "steps": 16, "batch": 4, "seconds": 8.0}
                run |= {"trained": SIZES.get(method, 60 * (rank or 0)), "validation": 1.0 + (lr != rates[1])}
                run |= {"rank": rank} if rank else {}
                if lr == rates[1]:
                    run |= {"loss": 1.2 + 0.1 * seed, "bleu": 50.0 + seed, "interval": 4.0, "signature": "s"}
                runs.append(run)
    shared = {f"{kind} {side}": PHI for kind in KINDS for side in ("in", "out", "A")} | {"cosine": 0.5}
    low, high = ({"amplification": factor} for factor in (9.0, 2.0))
    columns = ("delta_norm", "projected_norm", "random_norm", "top_norm", "amplification", "excess", "z")
    texts = {"source": "E2E", "train": 9, "validation": 3, "validation_tokens": 5, "held_out": 3, "held_out_tokens": 7}
    return json.loads(json.dumps({
        "command": "this", "machine": {"processor": "P"}, "model_size": 1000, "texts": texts | {"written": 2},
        "plan": {"recipe": asdict(QUICK.recipe), "rates": QUICK.rates, "ranks": QUICK.ranks, "seeds": QUICK.seeds}
        | {"model": "m", "device": "cpu"},
        "base": {"loss": 3.0, "bleu": 1.0, "interval": 0.5, "signature": "s"}, "runs": runs,
        "ranks": {"r = 8 and r = 64, seed 0": shared}, "seeds": {},
        "amplification": {
            f"r = {rank}, {kind}": dict.fromkeys(columns, 1.5) | changed
            for rank, changed in ((1, low), (64, high)) for kind in KINDS
        },
    }))  # fmt: skip


def page(found: dict[str, Any]) -> str:
    from language import nlg_report

    return nlg_report.page(found, Path("none"))


def test_a_row_has_the_runs_at_the_best_rate() -> None:
    lines = page(numbers()).splitlines()
    assert "| not trained | 0 |  |  | 3.000 | 1.0 | ± 0.5 |  |" in lines
    assert "| full fine-tuning | 1,000 | 100.00 % | 1e−4 | 1.250 ± 0.050 | 50.5 ± 0.5 | ± 4.0 | 0.50 |" in lines
    assert "| LoRA r = 64, q and v | 3,840 | 384.00 % | 3e−3 | 1.250 ± 0.050 | 50.5 ± 0.5 | ± 4.0 | 0.50 |" in lines
    assert "| BitFit, with biases added | 3e−3: 2.000, 1e−2: **1.000**, 3e−2: 2.000 |  |" in lines
    assert "## What is missing" not in lines
    assert "## ΔW against W (Table 7)" in lines
    assert "## Two seeds (Figure 4)" not in lines  # nothing was measured


def test_a_rate_at_the_end_of_its_grid_and_what_is_missing_are_named() -> None:
    found = numbers()
    found["runs"] = [run for run in found["runs"] if run["seed"] == 0 or run["method"] != "prefix"]
    for run in found["runs"]:
        if run["method"] == "bitfit" and run["lr"] == 3e-2:
            run["validation"] = 0.5
        if run["method"] == "full" and run["lr"] == 3e-4:
            run["validation"] = None
    text = page(found)
    assert "| BitFit, with biases added | 3e−3: 2.000, 1e−2: 1.000, 3e−2: **0.500** | yes |" in text
    assert "3e−4: diverged, 1e−3: 2.000 |" in text
    assert "- prefix of 16 tokens: seed 1\n" in text
    found["runs"] = []
    assert "- LoRA r = 1, q and v: seed 0, 1" in page(found)


def test_the_figure_has_a_mark_for_every_run() -> None:
    from language.nlg_report import figure

    made = figure(numbers())
    loss, bleu = made.charts
    marks = [y for line in loss.lines if line.marker for y in line.y]
    assert sorted(marks) == pytest.approx([1.2] * 7 + [1.3] * 7)
    ranks = next(line for line in bleu.lines if line.name == "LoRA on q and v, mean")
    assert list(ranks.y) == [50.5] * 3
    assert [10**x for x in ranks.x] == pytest.approx([60, 480, 3840])
    assert len(draw_figure(made).axes) == 2
    empty = figure(numbers() | {"runs": []})
    assert all(chart.remark == "all of it is 0" for chart in empty.charts)


def test_the_claims_follow_from_the_numbers() -> None:
    from language.nlg_claims import claims
    from language.nlg_report import variants

    found = numbers()
    made = claims(found, variants(found))
    no = "does not agree"
    assert [claim.verdict for claim in made] == ["agrees", no, no, "agrees", no, "not measured", "agrees", no]
    assert made[0].measured.startswith("LoRA r = 8, q and v − full fine-tuning: loss +0.000 and +0.000, BLEU +0.0")
    for run in found["runs"]:
        if run["method"] == "lora" and run["rank"] == 1 and "loss" in run and run["seed"] == 0:
            run["loss"] += 0.1
        if run["method"] in ("prefix", "bottleneck") and "loss" in run:
            run["loss"] += 0.1
    found["seeds"] = found["ranks"]
    verdicts = [claim.verdict for claim in claims(found, variants(found))]
    assert verdicts == ["agrees", "agrees", "agrees", "not decided", no, no, "agrees", no]
    far = {
        key: value | {"phi_all": 0.9, "chance_1_1": 0.05, "chance_all": 0.1} if key != "cosine" else value
        for key, value in found["ranks"]["r = 8 and r = 64, seed 0"].items()
    }
    found["seeds"] = {"two": far}
    for measures in found["amplification"].values():
        measures["z"] = 4.0
    assert [claim.verdict for claim in claims(found, variants(found))][-3:] == ["agrees"] * 3
    assert "| **not measured** |" in page(numbers() | {"runs": []})
