"""The claims of "LoRA Without Regret", in small: learning rates, ranks, layers and batches on SmolLM2-135M.

    LORALENS_TEXTS=FOLDER python examples/without_regret_study.py           few steps on short texts: an hour
    LORALENS_TEXTS=FOLDER python examples/without_regret_study.py --full    all texts, many steps (--device cuda)
    python examples/without_regret_study.py --report                        draw the page again, in seconds

Schulman and Thinking Machines Lab (2025, https://thinkingmachines.ai/blog/lora/) compare LoRA with full fine-tuning
over sweeps of the learning rate. They say that the best rate hardly depends on the rank and is about ten times that of
full fine-tuning; that LoRA then learns as well as full fine-tuning, until its capacity ends; that LoRA on attention
alone trails, also with equally many parameters; and that large batches cost LoRA more. Here SmolLM2-135M learns to
write a sentence for a meaning representation (E2E NLG). Every run has its own learning rate, and a cell is judged at
its best one: the loss on the sentences of meanings that no training text has, in nats per token. As in that paper the
rate is constant, and α = 32 at every rank.

Everything that was measured is kept, and a study that was interrupted continues. Cells that have not been measured are
named on the page. Writes reports/without_regret.md, its numbers in reports/without_regret.json, and a figure.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs import quiet

os.environ.update(quiet())  # before torch is imported

from language.recipe import MODEL, Recipe
from language.study import plan_facts, run_study

if TYPE_CHECKING:
    from language.bench import Bench

ALPHA = 32.0
ATTENTION, MLP, ALL = "q_proj+k_proj+v_proj+o_proj", "gate_proj+up_proj+down_proj", "all-linear"
ONE, VALUES = "model.layers.14.self_attn.v_proj", "v_proj"  # one layer in the middle of the model, and all of its kind


@dataclass(frozen=True)
class Cell:
    """One way to train, at several learning rates.

    Attributes
    ----------
    part : str
        The question that it is for: ``ranks``, ``layers``, ``batches`` or ``capacity``.
    targets, rank : str and int, optional
        The layers and the rank of LoRA; None for full fine-tuning.
    """

    part: str
    rates: Sequence[float]
    targets: str | None = None
    rank: int | None = None
    batch: int = 4
    steps: int = 16


@dataclass(frozen=True)
class Plan:
    """The cells, and the seeds at which each is trained."""

    recipe: Recipe
    cells: Sequence[Cell]
    seeds: Sequence[int] = (0, 1)
    model: str = MODEL


def cells(
    *, steps: int, batch: int, larger: int, ranks: Sequence[int], full: Sequence[float], lora: Sequence[float]
) -> Iterator[Cell]:
    """The cells of a study, in the order of their importance.

    The ranks of attention and MLP are those at which all layers, attention and MLP have the same number of parameters
    within 1.5 %: 81,408, 80,640 and 82,368 per block. Batches of ``larger`` texts see the same number of texts in
    fewer steps.
    """
    fixed = {"steps": steps, "batch": batch}
    fewer = {"steps": max(1, steps * batch // larger), "batch": larger}
    yield Cell("ranks", full, **fixed)
    for rank in ranks:
        yield Cell("ranks", lora, ALL, rank, **fixed)
    yield Cell("layers", lora, ATTENTION, 21, **fixed)
    yield Cell("layers", lora, MLP, 13, **fixed)
    # Few steps and few parameters bear larger rates.
    yield Cell("batches", full[1:], **fewer)
    yield Cell("batches", lora[1:], ALL, 8, **fewer)
    yield Cell("capacity", lora[1:], VALUES, 1, **fixed)
    yield Cell("capacity", lora[1:], ONE, 1, **fixed)


QUICK_RATES = {"full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (3e-4, 1e-3, 3e-3, 1e-2)}
QUICK = Plan(
    Recipe(steps=16, batch=4, characters=200, length=96, schedule="constant", validation=0, judged=32),
    tuple(cells(steps=16, batch=4, larger=16, ranks=(1, 8, 64), **QUICK_RATES)),
)
FULL_RATES = {
    "full": (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    "lora": (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3),
}
FULL = Plan(
    Recipe(steps=3000, batch=8, characters=1000, length=192, schedule="constant", validation=0, judged=600),
    tuple(cells(steps=3000, batch=8, larger=128, ranks=(1, 4, 8, 16, 64, 256), **FULL_RATES)),
    seeds=(0, 1, 2),
)


def study(plan: Plan, bench: "Bench", folder: Path) -> dict[str, Any]:
    """Train what is missing; return everything that the page shows as plain numbers."""
    from language.kept_runs import model_facts, without_texts

    facts = model_facts(bench, folder, lambda: {"held_out": bench.loss(bench.model, "held_out")})
    runs: list[dict[str, Any]] = []
    for seed in plan.seeds:  # all cells at one seed before the next: a study that is cut short is broad
        runs += seed_runs(plan, seed, bench, folder)
    return {
        **plan_facts(plan, bench, cells=[asdict(cell) for cell in plan.cells]),
        **facts,
        "runs": [without_texts(run) for run in runs],
    }


def seed_runs(plan: Plan, seed: int, bench: "Bench", folder: Path) -> list[dict[str, Any]]:
    """The runs of all cells at one seed, one for each rate."""
    from language.kept_runs import plain_run
    from language.lora import train_grid

    full_runs, grids = [], []
    for cell in plan.cells:
        if cell.targets is None:
            size = {"steps": cell.steps, "batch": cell.batch}
            full_runs += [plain_run(bench, folder, "full", lr=lr, seed=seed, **size) for lr in cell.rates]
        else:
            # The options in one order for all cells, so that all runs have their names in one folder.
            grid = {"targets": [cell.targets], "rank": [cell.rank], "lr": cell.rates, "batch": [cell.batch]}
            grids.append(grid | {"steps": [cell.steps], "seed": [seed]})
    adapted = train_grid(folder / "lora", grids, bench=bench, part="held_out", alpha=ALPHA)
    return [*(run for run in full_runs if run is not None), *adapted]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page."""
    run_study(
        arguments,
        __doc__,
        script="without_regret_study",
        report="regret_report",
        folder="out/without_regret",
        plans={"quick": QUICK, "full": FULL},
        measure=study,
    )


if __name__ == "__main__":
    main()
