"""Runs of a study of a language model, each kept as JSON when it is done: what is there is not made again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from language.bench import Bench
from rivals.kept import finished, keep

from loralens.errors import OptionError

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
) -> dict[str, Any] | None:
    """A run of a method of `rivals`; it is judged unless ``better_than`` has a lower loss on the validation texts.

    None if it is not done and the bench trains nothing.
    """
    path = folder / "rivals" / f"{method}.lr{lr:g}.seed{seed}.json"
    told = {"recipe": asdict(bench.recipe)}

    def is_better(run: Mapping[str, Any]) -> bool:
        return best_of([run, better_than] if better_than else [run]) is run

    found = finished(path, told)
    if bench.only_done or (found is not None and ("loss" in found or not is_better(found))):
        return found
    made, found = bench.trained(method, lr=lr, seed=seed)
    found |= {"validation": bench.loss(made, "validation") if found["losses"] else None, **told}
    if is_better(found):
        found |= bench.judged(made)
    return _keep(path, found)


def plain_run(
    bench: Bench, folder: Path, method: str, *, lr: float, seed: int, steps: int, batch: int
) -> dict[str, Any] | None:
    """A run of a method of `rivals` with its loss on the held-out texts alone."""
    path = folder / "rivals" / f"{method}.lr{lr:g}.batch{batch}.steps{steps}.seed{seed}.json"
    told = {"recipe": asdict(bench.recipe)}
    found = finished(path, told)
    if found is not None or bench.only_done:
        return found
    made, found = bench.trained(method, lr=lr, seed=seed, steps=steps, batch=batch)
    return _keep(path, found | {"held_out": bench.loss(made, "held_out") if found["losses"] else None, **told})


def model_facts(bench: Bench, folder: Path, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``base``: what ``judge`` says of the model before any training; ``texts``: the counts; ``model_size``.

    Raises
    ------
    OptionError
        The study has not begun, and the bench trains nothing.
    """
    path, told = folder / "base.json", {"recipe": asdict(bench.recipe)}
    found = finished(path, told)
    if found is None and bench.only_done:
        raise OptionError(f"{folder}: contains no runs of this study", fix="leave --so-far out")
    if found is None:
        facts = {"base": judge(), "texts": {"source": bench.pairs.source, **bench.counts}, "model_size": bench.size}
        found = _keep(path, {**told, **facts})
    return {"base": without_texts(found["base"]), "texts": found["texts"], "model_size": found["model_size"]}


def judged_adapter(bench: Bench, folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run of LoRA with its loss on the held-out texts and BLEU."""
    path = folder / "judged" / f"{Path(run['folder']).name}.json"
    told = {"recipe": asdict(bench.recipe)} | {name: run[name] for name in ("rank", "lr", "seed")}
    found = finished(path, told)
    if found is None and bench.only_done:
        return None
    if found is None:
        with bench.with_adapter(run["folder"]) as model:
            found = _keep(path, {**told, **bench.judged(model)})
    return {**run, **found}


def _keep(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    keep(path, found)
    print(f"  {path.stem}: {_said(found)}", flush=True)
    return found


def without_texts(run: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what the model wrote and without the recipe, which is that of the study."""
    return {name: _rounded(value) for name, value in run.items() if name not in (*TEXTS, "recipe")}


def _rounded(value: Any) -> Any:
    """A number with five digits, also in a list."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _said(run: Mapping[str, Any]) -> str:
    numbers = {name: run.get(name) for name in ("validation", "held_out", "loss", "bleu", "seconds")}
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None)
