"""LoRA and the alternatives on a language model that writes sentences: Table 3 of the LoRA paper, in small.

    LORALENS_TEXTS=FOLDER python examples/nlg_study.py           SmolLM2-135M, short texts, few steps: 16 minutes
    LORALENS_TEXTS=FOLDER python examples/nlg_study.py --full    all texts, thousands of steps (--device cuda)
    python examples/nlg_study.py --report                        draw the page again from reports/nlg.json, in seconds

SmolLM2-135M learns to write a sentence that says what a meaning representation says (E2E NLG), by full fine-tuning,
BitFit, a prefix, bottleneck adapters and LoRA on query and value. Every method sees the same batches in the same order,
under the same optimiser and schedule. Its learning rate is the one of its grid with the lowest loss on validation texts
at the first seed; all ranks of LoRA use the rate that is best at r = 8. The loss is measured on the sentences of
meanings that no training text has, in nats per token. BLEU is that of sacrebleu, of sentences that the model writes for
the same meanings (greedy decoding), against all sentences that people wrote for them. Then the questions of the paper's
Section 7 are asked of the adapters.

Everything that was measured is kept, and a study that was interrupted continues. Writes reports/nlg.md, its numbers in
reports/nlg.json, and figures.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs import quiet

os.environ.update(quiet())  # before torch is imported

from language.recipe import MODEL, Recipe
from language.study import plan_facts, run_study

if TYPE_CHECKING:
    from language.bench import Bench

LORA = "lora"
TARGETS = "q_proj,v_proj"  # the paper's choice
KINDS = ("q_proj", "v_proj")
SMALL = 8  # the rank that the learning rate is chosen at, and that is compared with the largest


@dataclass(frozen=True)
class Plan:
    """What is trained and judged.

    Attributes
    ----------
    rates : mapping of str to sequence of float
        The learning rates that are tried for each method.
    """

    recipe: Recipe
    rates: Mapping[str, Sequence[float]]
    ranks: Sequence[int] = (1, SMALL, 64)
    seeds: Sequence[int] = (0, 1)
    model: str = MODEL

    @property
    def rivals(self) -> list[str]:
        """The methods beside LoRA."""
        return [method for method in self.rates if method != LORA]


QUICK = Plan(
    Recipe(steps=16, batch=4, characters=200, length=96, schedule="linear", validation=32, judged=48, written=32),
    rates={
        "full": (3e-5, 1e-4, 3e-4, 1e-3),
        "bitfit": (3e-3, 1e-2, 3e-2),
        "prefix": (3e-2, 1e-1, 3e-1, 1),
        "bottleneck": (1e-3, 3e-3, 1e-2),
        LORA: (1e-3, 3e-3, 1e-2, 3e-2),
    },
)
FULL = Plan(
    Recipe(
        steps=3200,
        batch=8,
        characters=1000,
        length=192,
        schedule="linear",
        validation=64,
        judged=600,
        written=600,
        longest=96,
    ),
    rates={
        "full": (2e-5, 5e-5, 1e-4, 2e-4),
        "bitfit": (1e-3, 3e-3, 1e-2),
        "prefix": (3e-3, 1e-2, 3e-2),
        "bottleneck": (3e-4, 1e-3, 3e-3),
        LORA: (2e-4, 5e-4, 1e-3, 2e-3),
    },
    ranks=(1, 2, 4, SMALL, 64),
    seeds=(0, 1, 2),
)


def rival_runs(plan: Plan, bench: "Bench", folder: Path) -> list[dict[str, Any]]:
    """The runs of all methods beside LoRA: every rate at the first seed, and the best one at the others."""
    from language.kept_runs import best_of, rival_run

    rivals: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    for method in plan.rivals:
        tried: list[dict[str, Any]] = []
        for lr in plan.rates[method]:
            run = rival_run(bench, folder, method, lr=lr, seed=plan.seeds[0], better_than=best_of(tried))
            tried += [run] if run else []
        best[method] = best_of(tried)
        rivals += tried
    for seed in plan.seeds[1:]:
        runs = [rival_run(bench, folder, name, lr=run["lr"], seed=seed) for name, run in best.items() if run]
        rivals += [run for run in runs if run]
    return rivals


def lora_runs(plan: Plan, bench: "Bench", folder: Path) -> tuple[list[dict[str, Any]], dict[tuple[int, int], Path]]:
    """The runs of LoRA, and the folder of the adapter of each rank and seed at the best rate."""
    from language.kept_runs import best_of, judged_adapter
    from language.lora import train_grid

    first = {"rank": [SMALL], "lr": plan.rates[LORA], "seed": plan.seeds[:1]}
    tried = train_grid(folder / "lora", [first], bench=bench, targets=TARGETS)
    best = best_of(tried)
    if best is None:
        return tried, {}
    every = {"rank": plan.ranks, "lr": [best["lr"]], "seed": plan.seeds}
    trained = train_grid(folder / "lora", [every], bench=bench, targets=TARGETS)
    finite = [run for run in trained if run["validation"] is not None]
    places = {(run["rank"], run["seed"]): Path(run["folder"]) for run in finite}
    judged = [judged_adapter(bench, folder, run) for run in finite]
    return [*(run for run in tried if run["lr"] != best["lr"]), *(run for run in judged if run)], places


def section7(plan: Plan, places: Mapping[tuple[int, int], Path]) -> dict[str, Any]:
    """The questions of Section 7: ranks, seeds, and ΔW against W."""
    from paper_section7 import amplified, shared

    import loralens

    adapters = {place: loralens.load(path) for place, path in places.items()}
    small, large, seeds = SMALL, max(plan.ranks), plan.seeds
    pairs = {f"r = {small} and r = {large}, seed {seed}": ((small, seed), (large, seed)) for seed in seeds}
    across = {
        f"r = {rank}, seeds {one} and {other}": ((rank, one), (rank, other))
        for rank in (small, large)
        for one, other in pairwise(seeds)
    }

    def measured(compared: Mapping[str, Any]) -> dict[str, Any]:
        available = {name: two for name, two in compared.items() if all(place in adapters for place in two)}
        return {name: shared(*(adapters[place] for place in two), KINDS) for name, two in available.items()}

    amplification = {
        f"r = {rank}, {kind}": medians
        for (rank, seed), adapter in sorted(adapters.items())
        if seed == seeds[0]
        for kind, medians in amplified(adapter, plan.model, KINDS).items()
    }
    return {"ranks": measured(pairs), "seeds": measured(across), "amplification": amplification}


def study(plan: Plan, bench: "Bench", folder: Path) -> dict[str, Any]:
    """Train and judge what is missing; return everything that the page shows as plain numbers."""
    from language.bleu import new_metric
    from language.kept_runs import model_facts, without_texts

    new_metric()  # what is not installed is missed now and not after hours of training
    facts = model_facts(bench, folder, lambda: bench.judged(bench.model))
    adapted, places = lora_runs(plan, bench, folder)
    rivals = rival_runs(plan, bench, folder)
    rates = {name: list(tried) for name, tried in plan.rates.items()}
    return {
        **plan_facts(plan, bench, rates=rates, ranks=list(plan.ranks)),
        **facts,
        "runs": [without_texts(run) for run in [*rivals, *adapted]],
        **section7(plan, places),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, judge it, and write the page."""
    run_study(
        arguments,
        __doc__,
        script="nlg_study",
        report="nlg_report",
        folder="out/nlg",
        plans={"quick": QUICK, "full": FULL},
        measure=study,
    )


if __name__ == "__main__":
    main()
