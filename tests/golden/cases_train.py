"""Cases of verbs that run a model: train, evaluate, behave, calibrate, and what reads their output."""

from collections.abc import Iterator
from typing import Any

from tests.golden.call import Case, call

CPU = {"device": "cpu", "threads": 1}
SHORT: dict[str, Any] = {**CPU, "steps": 3, "batch": 2, "length": 16, "rank": 2, "output": "OUT/adapter"}
METHODS = ("lora", "rslora", "lora+", "dora", "pissa", "frozen-a")
TEXTS, OTHER = "made/texts.jsonl", "made/other.jsonl"
TASKS = {"causal-lm": "made/llama", "classification": "made/classifier"}
MODELS = {**TASKS, "masked-lm": "made/bert"}
ADAPTERS = {"causal-lm": "made/llama-a", "masked-lm": "made/bert-a", "classification": "made/classifier-a"}


def _train() -> Iterator[Case]:
    for method in METHODS:
        for task, model in TASKS.items():
            made = call("train", model=model, task=task, data=TEXTS, eval=OTHER, method=method, **SHORT)
            yield Case(f"train/{task}-{method}", (made, call("inspect", "OUT/adapter")))
    options = {
        "snapshots": 1, "watch": 1, "schedule": "cosine", "optimiser": "sgd", "dropout": 0.1, "targets": "q_proj",
        "accumulate": 2, "weight_decay": 0.1, "evaluate_every": 1, "patience": 2, "seed": 4, "checkpointing": True,
    }  # fmt: skip
    causal = {"model": TASKS["causal-lm"], "task": "causal-lm", "data": TEXTS}
    yield Case(
        "train/options",
        (
            call("train", eval=OTHER, **causal, **SHORT, **options),
            call("trajectory", "OUT/adapter"),
            call("train", dry_run=True, json=False, **causal, **(SHORT | {"output": "OUT/dry"})),
            call("train", json=False, **causal, **(SHORT | {"output": "OUT/text", "dtype": "bf16"})),
            call("train", **causal, **SHORT),
        ),
    )
    corpus = {"model": "minilm", "task": "classification", "data": "reuters-r8"}
    few = {"steps": 2, "batch": 4, "length": 32, "eval_limit": 16}
    yield Case("train/corpus", (call("train", **corpus, **(SHORT | few)),))


def _run() -> Iterator[Case]:
    for task, model in MODELS.items():
        path = ADAPTERS[task]
        second = f"{path[:-1]}b"
        measured = {"model": model, "data": TEXTS, **CPU}
        if task in TASKS:
            yield Case(
                f"evaluate/{task}",
                (
                    call("evaluate", task=task, **measured),
                    call("evaluate", path, second, task=task, **measured),
                    call("evaluate", path, task=task, json=False, batch=2, length=8, limit=3, **measured),
                ),
            )
        yield Case(
            f"behave/{task}",
            (
                call("behave", path, **measured),
                call("behave", path, second, **measured),
                call("behave", path, second, json=False, limit=2, batch=1, **measured),
            ),
        )
        if task != "classification":
            yield Case(f"explain/{task}", (call("explain", path, base=model, samples=1, **CPU),))
        moments = {"activations": "OUT/moments.safetensors"}
        yield Case(
            f"calibrate/{task}",
            (
                call("calibrate", path, output="OUT/moments.safetensors", **measured),
                call("compress", path, output="OUT/half", parameters=0.5, **moments),
                call("compress", path, output="OUT/one", rank=1, **moments),
                call("curve", path, **moments),
                call("report", path, output="OUT/page.html", **moments),
                call("calibrate", path, dry_run=True, json=False, output="OUT/dry.safetensors", **measured),
            ),
        )
    out = {"model": TASKS["causal-lm"], "data": TEXTS, "out_side": True, **CPU}
    yield Case(
        "calibrate/out-side",
        (
            call("calibrate", ADAPTERS["causal-lm"], output="OUT/m.safetensors", **out),
            call("compress", ADAPTERS["causal-lm"], output="OUT/half", parameters=0.5, activations="OUT/m.safetensors"),
        ),
    )
    examples = ("examples/reuters-r8-r8-seed0", "examples/reuters-r8-r64-seed0")
    task = {"model": "minilm", "task": "classification", "data": "reuters-r8", "limit": 16, "length": 32, **CPU}
    yield Case("evaluate/examples", (call("evaluate", *examples, **task),))


CASES = (*_train(), *_run())
