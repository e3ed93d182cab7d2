"""The table of all tasks and tools, as Markdown, from the results of one run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]
HEAD = ("task", "tool", "time", "CPU time", "peak memory", "result")


@dataclass(frozen=True)
class Task:
    """What was asked of the tools: where its results are, how tools are called, and what says how good a result is."""

    title: str
    path: tuple[str, ...]
    tools: dict[str, str]
    quality: Callable[[Record, str], str]


def _error(task: Record, tool: str) -> str:
    return f"error {_percent(task['tools'][tool]['error'])}"


def _error_and_size(task: Record, tool: str) -> str:
    return f"{_error(task, tool)}, {task['tools'][tool]['file_bytes'] / 1e9:.2f} GB"


def _energy(task: Record, tool: str) -> str:
    return f"energy kept {_percent(task['tools'][tool]['energy_kept'])}"


def _singular_values(task: Record, tool: str) -> str:
    owner = {"loralens": "loralens", "adaptersentry_core": "adaptersentry"}.get(tool, "")
    found = {name: errors.get(owner) for name, errors in task["largest_relative_error"].items()}
    if not all(found.values()):
        return ""
    plain, hard = found.values()
    return f"error of a singular value {plain['of_any']:.0e}; κ = 1000: {hard['of_any']:.0e}"


PEFT, MERGEKIT, EXPORT = "PEFT", "mergekit", "llama-export-lora"
BARE, CERTIFIED = "loralens", "loralens, with certificate"
SCRIPTS = "sd-scripts, `{}.py`"
TASKS = (
    Task(
        "merge into a model of 1.6 GB in bf16",
        ("merge",),
        {"bare": BARE, "certificate": CERTIFIED, "peft": f"{PEFT}, `merge_and_unload`",
         "axolotl": "axolotl, memory-efficient merge", "mergekit": f"{MERGEKIT}, `mergekit-yaml`"},
        _error,
    ),
    Task(
        "merge into a GGUF model of 1.6 GB in f16",
        ("gguf", "F16"),
        {"bare": BARE, "certificate": CERTIFIED, "llama-export-lora": EXPORT},
        _error,
    ),
    Task(
        "merge into a GGUF model in Q4_K",
        ("gguf", "Q4_K"),
        {"bare": "loralens, to f16", "llama-export-lora": f"{EXPORT}, to f16", "keep": "loralens, `--bits keep`"},
        _error_and_size,
    ),
    Task(
        "extract an adapter of rank 16 from two models",
        ("extract",),
        {"loralens": BARE, "mergekit": f"{MERGEKIT}, `mergekit-extract-lora`"},
        _error,
    ),
    Task(
        "lower the rank of a kohya file from 64 to 16",
        ("compress",),
        {"loralens": BARE, "sd-scripts": SCRIPTS.format("resize_lora")},
        _energy,
    ),
    Task(
        "sum of two adapters, cut to the rank of one",
        ("sum",),
        {"loralens": BARE, "sd-scripts": SCRIPTS.format("svd_merge_lora"),
         "peft": f"{PEFT}, `add_weighted_adapter` (svd)"},
        _error,
    ),
    Task(
        "look at an adapter for a 7B model, r = 16",
        ("spectrum",),
        {"loralens": "loralens `spectrum`", "loralens_doctor": "loralens `doctor`",
         "adaptersentry": "adaptersentry `scan`",
         "adaptersentry_core": "adaptersentry, its singular values alone"},
        _singular_values,
    ),
)  # fmt: skip


def markdown(result: Record) -> str:
    """One row for each task and tool. Ratios are over the first tool of the task, which is loralens."""
    rows = [HEAD, tuple("---" for _ in HEAD)]
    for task in TASKS:
        rows += _rows(task, result)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _rows(task: Task, result: Record) -> list[tuple[str, ...]]:
    found = result
    for key in task.path:
        found = found[key]
    rows, first = [], found["tools"][next(iter(task.tools))]
    for place, (tool, name) in enumerate(task.tools.items()):
        figure, title = found["tools"].get(tool), "…" if place else task.title
        if isinstance(figure, Mapping):
            costs = [_seconds(figure[cost], first[cost] if place else 0.0) for cost in ("seconds", "cpu_seconds")]
            rows.append((title, name, *costs, f"{figure['peak_mib']:.0f} MiB", task.quality(found, tool)))
        elif figure:
            rows.append((title, name, figure, "", "", ""))
    return rows


def _seconds(seconds: float, first: float) -> str:
    told = f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{told} ({seconds / first:.2g} ×)" if first else told


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
