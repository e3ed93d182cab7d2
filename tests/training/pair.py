"""Two processes that train together, and one that trains alone: what a test of them runs.

``python -m tests.training.pair FOLDER`` writes, into FOLDER, the factors and measures that each process came to.
"""

import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from loralens import LoraLensError
from loralens.core import State
from loralens.training import Course, Examples, Watch, fit, task_named
from loralens.training.feed import shuffle_order
from loralens.training.world import World
from tests import models
from tests.processes import in_children
from tests.training import pair_loaders

STEPS, BATCH = 5, 4
RNG = np.random.default_rng(0)
LABELLED = Examples([RNG.integers(2, 24, n).tolist() for n in (3, 9, 1, 6, 2, 8, 5)], 0, [0, 1, 1, 0, 1, 0, 0])
SPOKEN = Examples(LABELLED.tokens, 0)

# Name → options of a run; each is run by one process and by two, with the same batches in every step.
CASES: dict[str, dict[str, Any]] = {
    "ddp tokens": {"task": "causal-lm"},
    "ddp accumulate dora checkpointing": {"accumulate": 2, "method": "dora", "checkpointing": True},
    "ddp patience": {"patience": 1},
    "ddp adamw": {"optimiser": "adamw"},
    "shard tokens pissa": {"shard": True, "task": "causal-lm", "method": "pissa"},
    "shard accumulate dora checkpointing": {"shard": True, "accumulate": 2, "method": "dora", "checkpointing": True},
    "shard patience": {"shard": True, "patience": 1},
    "shard adamw": {"shard": True, "optimiser": "adamw"},
}


def trained(
    *, task: str = "classification", accumulate: int = 1, shard: bool = False, checkpointing: bool = False,
    patience: int | None = None, optimiser: str = "sgd", method: str = "lora", state: State | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A run of this process, alone or with others: what came of it."""
    world = World.current()
    row, calls = task_named(task), []
    kind = "BertForSequenceClassification" if row.labelled else "BertLMHeadModel"
    examples = LABELLED if row.labelled else SPOKEN
    measured = row.evaluation(examples, size=3, world=world)

    def evaluate(model: Any) -> dict[str, float]:
        """The measures; for patience, which needs a loss that rises again, the accuracy stands for it."""
        measures = dict(measured(model))
        return measures | ({} if patience is None else {"loss": -measures["accuracy"]})

    states: list[State] = []
    watch = Watch(
        on_step=lambda step: calls.append(("step", step.number, step.size)),
        evaluate=evaluate,
        on_evaluation=lambda step, measures: calls.append(("evaluation", step)),
        evaluate_every=2, patience=patience,
        snapshot=lambda step, adapter: calls.append(("snapshot", step)), snapshot_every=3,
        save=states.append, save_every=2,
    )  # fmt: skip
    order = shuffle_order(len(examples), size=BATCH // (accumulate * world.size), seed=1)
    found = fit(
        models.bert(kind, is_decoder=not row.labelled), row.batches(examples, order), loss=row.loss, watch=watch,
        state=state, shard=shard,
        course=Course(STEPS, lr=1e-2 if optimiser == "adamw" else 0.3, optimiser=optimiser, accumulate=accumulate,  # type: ignore[arg-type]
                      checkpointing=checkpointing, clip=0.5),
        targets=["query", "value", "word_embeddings" if row.labelled else "dense"], rank=2, method=method,
        heads=["classifier"] if row.labelled else (),
    )  # fmt: skip
    numbers = {f"{name}.{part}": getattr(module, part) for name, module in found.adapter.items() for part in "BA"}
    numbers |= {name: extra.tensor.read() for name, extra in found.adapter.extra.items()}
    return {
        "numbers": numbers, "losses": found.losses, "evaluations": found.evaluations, "calls": calls, "states": states,
        "best_step": found.best_step, "steps": found.steps,
    }  # fmt: skip


def scenario(name: str) -> dict[str, Any]:
    """One case and, of the same, what goes on from its first state."""
    options = CASES[name]
    whole = trained(**options)
    state = World.current(shard=False).from_main(lambda: whole["states"][0])
    return {"whole": whole, "rest": trained(state=state, **options)}


def refused() -> dict[str, Any]:
    """What each process ends with where the main one cannot make what all need."""

    def make() -> None:
        raise LoraLensError("only I can see it", fix="nothing")

    try:
        World.current().from_main(make)
    except LoraLensError as error:
        return {"error": error.what}
    except SystemExit as end:
        return {"exit": end.code}
    return {}


def kept(work: Callable[[], Any], file: Path) -> None:
    """Leave in a file what a work comes to."""
    torch.set_num_threads(1)
    file.write_bytes(pickle.dumps(work()))


def together(rank: int, store: Path) -> dict[str, Any]:
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=120)
    )
    found = {name: scenario(name) for name in CASES}
    found["loaders"], found["refused"] = pair_loaders.together(), refused()
    dist.destroy_process_group()
    return found


def alone() -> dict[str, Any]:
    found: dict[str, Any] = {name: trained(**{**options, "shard": False}) for name, options in CASES.items()}
    return {**found, "loaders": pair_loaders.alone()}


def main(folder: Path) -> None:
    works = {str(rank): partial(together, rank, folder / "store") for rank in (0, 1)} | {"alone": alone}
    in_children(*(partial(kept, work, folder / f"{name}.pickle") for name, work in works.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
