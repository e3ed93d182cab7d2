"""Runs of a study of a language model, each kept as JSON when it is done: what is there is not made again."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from language.bench import Bench
from rivals.kept import finished, keep

TEXTS = ("sentences", "folder")  # of a record, which a report leaves out


def best_of(runs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The run with the lowest loss on the validation texts; None if no loss is finite."""
    finite = [run for run in runs if run["validation"] is not None]
    return min(finite, key=lambda run: run["validation"]) if finite else None


def rival_run(
    bench: Bench,
    folder: Path,
    method: str,
    *,
    lr: float,
    seed: int,
    better_than: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A run of a method of `rivals`; it is judged unless ``better_than`` has a lower loss on the validation texts."""
    path = folder / "rivals" / f"{method}.lr{lr:g}.seed{seed}.json"
    told = {"recipe": asdict(bench.recipe)}

    def is_better(run: Mapping[str, Any]) -> bool:
        return best_of([run, better_than] if better_than else [run]) is run

    found = finished(path, told)
    if found is None or ("loss" not in found and is_better(found)):
        made, found = bench.trained(method, lr=lr, seed=seed)
        found |= {"validation": bench.loss(made, "validation") if found["losses"] else None, **told}
        if is_better(found):
            found |= bench.judged(made)
        keep(path, found)
        _say(found)
    return found


def judged_base(bench: Bench, folder: Path) -> dict[str, Any]:
    """The model before any training."""
    return _judged(folder / "base.json", {"recipe": asdict(bench.recipe)}, lambda: bench.judged(bench.model))


def judged_adapter(bench: Bench, folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run of LoRA with its loss on the held-out texts and BLEU."""

    def judge() -> dict[str, Any]:
        with bench.with_adapter(run["folder"]) as model:
            return bench.judged(model)

    told = {"recipe": asdict(bench.recipe)} | {name: run[name] for name in ("rank", "lr", "seed")}
    found = _judged(folder / "judged" / f"{Path(run['folder']).name}.json", told, judge)
    return {**run, **found}


def _judged(path: Path, told: dict[str, Any], judge: Any) -> dict[str, Any]:
    found = finished(path, told)
    if found is None:
        found = {**told, **judge()}
        keep(path, found)
        _say(found)
    return found


def without_texts(run: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the model wrote and without the recipe, which is that of the study."""
    return {name: _rounded(value) for name, value in run.items() if name not in (*TEXTS, "recipe")}


def _rounded(value: Any) -> Any:
    """A number with five digits, also in a list."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _say(run: Mapping[str, Any]) -> None:
    said = [str(run.get("method", "base"))]
    for name in ("rank", "lr", "seed", "validation", "loss", "bleu", "seconds"):
        value = run.get(name)
        said += [] if value is None else [f"{name} {value:.4g}"]
    print("  " + ", ".join(said), flush=True)
