"""The LoRA runs of a study of a language model, as a grid of `loralens train`."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from language.bench import Bench
from language.texts import write_pairs

import loralens

Axes = Mapping[str, Sequence[Any]]


def train_grid(
    folder: Path, grids: Sequence[Axes], *, bench: Bench, part: str = "validation", **options: Any
) -> list[dict[str, Any]]:
    """Make the runs of some grids that are missing in the folder; return the records of all, in their order.

    ``options`` are those of `loralens.train` that differ from the recipe of the bench, or that it does not have. The
    loss on the texts of ``part``, which has this name in the record, is None for a run that has diverged. Runs that are
    not done are left out, which happens only if the bench trains nothing.
    """
    recipe = bench.recipe
    texts = folder.parent / "texts"
    options = {
        "model": bench.source,
        "task": "causal-lm",
        "data": write_pairs(bench.pairs.train, texts / "train.jsonl"),
        "eval": write_pairs(bench.part(part), texts / f"{part}.jsonl"),
        "length": recipe.length,
        "schedule": recipe.schedule,
        "device": bench.device,
        "dtype": "f32",
        "threads": bench.threads,
        "jobs": bench.jobs,
        "dry_run": bench.only_done,
    } | options
    axes = {name for grid in grids for name in grid}
    options |= {name: getattr(recipe, name) for name in ("steps", "batch") if name not in axes}
    result = loralens.train(output=folder, grid=grids, **options)
    done = [run for point in _points(grids) for run in result.where(**point) if run.status in ("done", "diverged")]
    return [_record(run, part) for run in done]


def _points(grids: Sequence[Axes]) -> Iterator[dict[str, Any]]:
    """The settings of every run."""
    for grid in grids:
        for values in product(*grid.values()):
            yield dict(zip(grid, values, strict=True))


def _record(run: Any, part: str) -> dict[str, Any]:
    """A run of a grid as a record like those of `language.bench`."""
    losses = [entry["loss"] for entry in run.log if "loss" in entry]
    done = run.status == "done"
    return {
        "method": "lora",
        **{name: run.settings[name] for name in ("targets", "rank", "lr", "seed", "steps", "batch")},
        "trained": run.results.get("trainable"),
        "losses": losses if done else None,
        part: run.results["eval_loss"] if done else None,
        "seconds": round(run.results.get("seconds", 0.0), 1),
        "folder": str(run.output),
    }
