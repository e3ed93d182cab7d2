"""Runs of a study of a language model. Each is kept as JSON when it is done, and is not made again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from language.bench import Bench
from rivals.kept import finished, keep

from loralens.errors import OptionError

TEXTS = ("sentences", "folder")  # parts of a record that a report leaves out


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
    identity = {"recipe": asdict(bench.recipe)}

    def is_better(run: Mapping[str, Any]) -> bool:
        return best_of([run, better_than] if better_than else [run]) is run

    record = finished(path, identity)
    if bench.only_done or (record is not None and ("loss" in record or not is_better(record))):
        return record
    model, record = bench.trained(method, lr=lr, seed=seed)
    record |= {"validation": bench.loss(model, "validation") if record["losses"] else None, **identity}
    if is_better(record):
        record |= bench.judged(model)
    return _keep(path, record)


def plain_run(
    bench: Bench, folder: Path, method: str, *, lr: float, seed: int, steps: int, batch: int
) -> dict[str, Any] | None:
    """A run of a method of `rivals` with its loss on the held-out texts alone."""
    path = folder / "rivals" / f"{method}.lr{lr:g}.batch{batch}.steps{steps}.seed{seed}.json"
    identity = {"recipe": asdict(bench.recipe)}
    record = finished(path, identity)
    if record is not None or bench.only_done:
        return record
    model, record = bench.trained(method, lr=lr, seed=seed, steps=steps, batch=batch)
    return _keep(path, record | {"held_out": bench.loss(model, "held_out") if record["losses"] else None, **identity})


def model_facts(bench: Bench, folder: Path, judge: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``base``: what ``judge`` returns for the model before any training; ``texts``: the counts; ``model_size``.

    Raises
    ------
    OptionError
        The study has not begun, and the bench trains nothing.
    """
    path, identity = folder / "base.json", {"recipe": asdict(bench.recipe)}
    record = finished(path, identity)
    if record is None and bench.only_done:
        raise OptionError(f"{folder}: contains no runs of this study", fix="leave --so-far out")
    if record is None:
        facts = {"base": judge(), "texts": {"source": bench.pairs.source, **bench.counts}, "model_size": bench.size}
        record = _keep(path, {**identity, **facts})
    return {"base": without_texts(record["base"]), "texts": record["texts"], "model_size": record["model_size"]}


def judged_adapter(bench: Bench, folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a run of LoRA with its loss on the held-out texts and BLEU."""
    path = folder / "judged" / f"{Path(run['folder']).name}.json"
    identity = {"recipe": asdict(bench.recipe)} | {name: run[name] for name in ("rank", "lr", "seed")}
    record = finished(path, identity)
    if record is None and bench.only_done:
        return None
    if record is None:
        with bench.with_adapter(run["folder"]) as model:
            record = _keep(path, {**identity, **bench.judged(model)})
    return {**run, **record}


def _keep(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    keep(path, record)
    print(f"  {path.stem}: {_said(record)}", flush=True)
    return record


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
