"""The costs of a method: those of training, compared with full fine-tuning, and the latency of the adapted model.

Times are reported as ratios of two measurements made in turn, in one process: if the machine slows down, it slows both.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rivals.methods import METHODS, Method, method_named
from rivals.training import MODEL, adam, classifier, update
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loralens.core.adapter import Adapter
from loralens.merging.switchboard import Switchboard
from loralens.training import Course, Injection, read_injection

CLASSES = 20
LATENCIES = (1, 32)  # texts at a time
Batch = dict[str, Tensor]


def measure(
    method: str,
    *,
    batch: int = 32,
    length: int = 64,
    turns: int = 8,
    rounds: Sequence[int] = (60, 12),
    threads: int = 1,
    memory: bool = True,
    model: str = MODEL,
) -> dict[str, Any]:
    """The costs of one method.

    Parameters
    ----------
    method : str
    batch, length : int
        Texts in a step, and tokens in a text. The tokens are random, without padding, because the cost does not depend
        on them.
    turns : int
        The number of timed steps, each with a step of full fine-tuning for comparison.
    rounds : sequence of int
        The number of timed forward passes for each entry of `LATENCIES`, each with one of the base model for
        comparison.
    memory : bool
        Whether to measure the memory, for which a process of its own is started.

    Returns
    -------
    dict
        ``step``: see `step_time`; ``memory``: see `peak`; ``latency``: see `latency`, by form and texts at a time.
    """
    row = method_named(method)
    return {
        "method": method,
        "batch": batch,
        "length": length,
        "threads": threads,
        "turns": turns,
        "rounds": list(rounds),
        "step": step_time(row, batch=batch, length=length, turns=turns, threads=threads, model=model),
        "memory": peak(method, batch=batch, length=length, threads=threads, model=model) if memory else None,
        "latency": latency(row, length=length, rounds=rounds, threads=threads, model=model),
    }


def step_time(row: Method, *, batch: int, length: int, turns: int, threads: int, model: str) -> dict[str, float]:
    """Median seconds of a step and of one of full fine-tuning; ``ratio``: the median of their ratio, turn by turn."""
    steps = {
        "full": stepping(METHODS[0], batch=batch, length=length, threads=threads, model=model),
        "own": stepping(row, batch=batch, length=length, threads=threads, model=model),
    }
    seconds = in_turn(steps, turns=turns)
    return {
        "seconds": statistics.median(seconds["own"]),
        "full": statistics.median(seconds["full"]),
        "ratio": ratio(seconds["own"], seconds["full"]),
    }


def stepping(row: Method, *, batch: int, length: int, threads: int, model: str) -> Callable[[], object]:
    """A function that takes one training step per call."""
    made = row.prepare(fresh(model, threads), 0).eval()
    course = Course(1, lr=1e-6)
    optimiser = adam(made, course)
    inputs = random_texts(made, batch, length) | {"labels": torch.arange(batch) % CLASSES}
    return lambda: update(made, optimiser, inputs, clip=course.clip)


def fresh(model: str, threads: int) -> nn.Module:
    """The base with a head for `CLASSES` labels."""
    return classifier(model, tuple(map(str, range(CLASSES))), seed=0, threads=threads)


def random_texts(model: nn.Module, count: int, length: int) -> Batch:
    """Texts of random tokens, all of the same length."""
    words = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(words, (count, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def in_turn(acts: Mapping[str, Callable[[], object]], *, turns: int) -> dict[str, list[float]]:
    """Seconds of every act in every turn. The order is reversed from turn to turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(turns + 1):
        for name in list(acts) if turn % 2 else list(reversed(list(acts))):
            begun = perf_counter()
            acts[name]()
            if turn:
                seconds[name].append(perf_counter() - begun)
    return seconds


def ratio(some: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios turn by turn."""
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def latency(row: Method, *, length: int, rounds: Sequence[int], threads: int, model: str) -> dict[str, dict[str, Any]]:
    """For each form of the adapted model, the cost of a forward pass compared with the base model.

    Returns
    -------
    dict
        ``operations`` and ``base_operations``: the number of torch operations in a pass. For each number of texts at a
        time: ``milliseconds``, ``base`` and ``ratio``, medians over passes made in turn. ``same_graph``: whether the
        operations are the same as those of the base, in the same order and with the same shapes.
    """
    base, forms = fresh(model, threads), forms_of(row, model=model, threads=threads)
    found: dict[str, dict[str, Any]] = {name: _graphs(form, base, length) for name, form in forms.items()}
    for count, turns in zip(LATENCIES, rounds, strict=True):
        texts = random_texts(base, count, length)
        seconds = in_turn({name: answering(m, texts) for name, m in {"base": base, **forms}.items()}, turns=turns)
        for name in forms:
            found[name][str(count)] = {
                "milliseconds": 1000 * statistics.median(seconds[name]),
                "base": 1000 * statistics.median(seconds["base"]),
                "ratio": ratio(seconds[name], seconds["base"]),
            }
    return found


def answering(model: nn.Module, texts: Batch) -> Callable[[], object]:
    """A function that makes one forward pass per call."""

    def answer() -> object:
        with torch.inference_mode():
            return model(**texts).logits

    return answer


def forms_of(row: Method, *, model: str, threads: int) -> dict[str, nn.Module]:
    """Name → a form in which the trained model can be used: for LoRA, unmerged or merged into the weights."""
    if row.targets is None:
        made = row.prepare(fresh(model, threads), 0).eval()
        if hasattr(made, "active_peft_config"):
            made.active_peft_config.inference_mode = True  # PEFT then uses the prefix as it is stored
        return {"as trained": made}
    beside = as_if_trained(row.injected(fresh(model, threads), 0))
    return {"unmerged": beside.model.eval(), "merged": merged(fresh(model, threads), read_injection(beside)).eval()}


@torch.no_grad()
def as_if_trained(injection: Injection) -> Injection:
    """The same injection with random numbers in B, because with B = 0 the merge would change nothing."""
    generator = torch.Generator().manual_seed(0)
    for layer in injection.layers.values():
        layer.B.copy_(torch.randn(layer.B.shape, generator=generator) / 100)
    return injection


def merged(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with the adapter merged into its weights, and with the adapter's head."""
    Switchboard(model, {"task": adapter}).switch("task")
    return model


def _graphs(form: nn.Module, base: nn.Module, length: int) -> dict[str, Any]:
    texts = random_texts(base, 2, length)
    own, of_base = operations(form, texts), operations(base, texts)
    return {"operations": len(own), "base_operations": len(of_base), "same_graph": own == of_base}


class _Recorder(TorchDispatchMode):
    """Records every operation that reaches the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.seen.append((str(func), tuple(result.shape) if isinstance(result, Tensor) else ()))
        return result


def operations(model: nn.Module, texts: Batch) -> list[tuple[str, tuple[int, ...]]]:
    """Every operation of a forward pass and the shape of its result, in order."""
    with torch.no_grad(), _Recorder() as recorder:
        model(**texts)
    return recorder.seen


def peak(method: str, *, batch: int, length: int, threads: int, model: str) -> dict[str, float]:
    """``peak``: the peak MiB of a new process that trains by this method; ``loaded``: its MiB before the first step."""
    command = [sys.executable, "-m", "rivals.costs", method, str(batch), str(length), str(threads), model]
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    if done.returncode:
        raise SystemExit(f"measuring the memory of {method} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _peak_here(method: str, *, batch: int, length: int, threads: int, model: str, steps: int = 3) -> dict[str, float]:
    """Train for some steps in this process, and measure its peak memory."""
    step = stepping(method_named(method), batch=batch, length=length, threads=threads, model=model)
    loaded = _forget_peak()
    for _ in range(steps):
        step()
    return {"loaded": loaded, "peak": _resident("VmHWM"), "steps": steps}


def _forget_peak() -> float:
    """The memory now, in MiB. On Linux, the peak is reset too, so that the peak of loading does not count."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _resident("VmRSS")


def _resident(line: str) -> float:
    """A line of /proc/self/status in MiB; on systems without this file, the peak memory of the process."""
    status = Path("/proc/self/status")
    if not status.exists():
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most / 2**20 if sys.platform == "darwin" else most / 2**10
    found = next(text for text in status.read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) / 1024


if __name__ == "__main__":
    name, *numbers, folder = sys.argv[1:]
    size, tokens, cores = map(int, numbers)
    print(json.dumps(_peak_here(name, batch=size, length=tokens, threads=cores, model=folder)))
