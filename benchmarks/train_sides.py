"""Both sides of a training benchmark, `loralens.training.fit` and PEFT: one model, the same factors and batches."""

import resource
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from loralens.training import Course, Injection, Step, Watch, fit, inject
from loralens.training.targets import choose_layers

Act = Callable[[Any], float]  # takes one step on a batch and returns the loss before the step
SIDES = ("ours", "ours_by_hand", "peft")


@dataclass(frozen=True)
class Setting:
    """What both sides train, and how: AdamW at a constant rate, gradients clipped at 1, no dropout anywhere.

    ``tokens`` is the number of tokens in each batch, padding included.
    """

    make: Callable[[], nn.Module]
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Any]
    targets: str | tuple[str, ...]
    tokens: Sequence[int]
    heads: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    lr: float = 1e-3
    device: str = "cpu"

    @property
    def pair(self) -> dict[str, Any]:
        """The arguments that `inject` and `fit` share."""
        return {"targets": self.targets, "heads": self.heads, "rank": self.rank, "alpha": self.alpha}

    @property
    def autocast(self) -> AbstractContextManager[Any]:
        """The default of `loralens.training.Course`: bfloat16 on CUDA, no autocast on a CPU."""
        return torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=self.cuda)

    @property
    def cuda(self) -> bool:
        """Whether the device is a CUDA GPU, which runs asynchronously."""
        return torch.device(self.device).type == "cuda"

    def wait(self) -> float:
        """The time after the device has finished all work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return perf_counter()


@dataclass
class Turns:
    """Times and losses of each side, and the number of tokens, for every turn after the warm-up turns."""

    tokens: list[int] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})
    losses: dict[str, list[float]] = field(default_factory=lambda: {side: [] for side in SIDES})

    def record(self) -> dict[str, object]:
        """Medians over the turns. A ratio is the median over the turns of PEFT's seconds over ours."""
        peft = self.seconds["peft"]
        ratio = {
            side: round(statistics.median(b / a for a, b in zip(self.seconds[side], peft, strict=True)), 3)
            for side in SIDES[:2]
        }
        apart = (abs(a - b) / abs(b) for a, b in zip(self.losses["ours"], self.losses["peft"], strict=True))
        rates = {
            side: round(statistics.median(n / s for n, s in zip(self.tokens, self.seconds[side], strict=True)), 1)
            for side in SIDES
        }
        return {
            "milliseconds": {side: round(1e3 * statistics.median(self.seconds[side]), 1) for side in SIDES},
            "tokens_per_second": rates,
            "throughput_over_peft": ratio,
            "turns": len(peft),
            "largest_relative_difference_of_losses": float(f"{max(apart):.2g}"),
        }


def injected(setting: Setting, model: nn.Module) -> Injection:
    """Our layers in the model, injected as `fit` does it."""
    return inject(model, **setting.pair)


def wrapped(setting: Setting, model: nn.Module, names: Iterable[str]) -> nn.Module:
    """PEFT's layers in the model, in the places of ours."""
    import peft

    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=setting.alpha,
        lora_dropout=0.0,
        target_modules=list(names),
        modules_to_save=list(setting.heads) or None,
    )
    return peft.get_peft_model(model, config).eval()  # as in `fit`, so that the base has no dropout either


@torch.no_grad()
def levelled(theirs: nn.Module, ours: Injection) -> nn.Module:
    """PEFT's layers with our factors copied into them, so that both sides start from the same weights."""
    for name, layer in ours.layers.items():
        beside: Any = theirs.get_submodule(f"base_model.model.{name}")
        beside.lora_A["default"].weight.copy_(layer.A)
        beside.lora_B["default"].weight.copy_(layer.B)
    return theirs


def by_hand(setting: Setting, model: nn.Module) -> Act:
    """The loop that a user of torch writes, the same for the layers of either side."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = AdamW(parameters, lr=setting.lr, weight_decay=0.0)

    def step(batch: Any) -> float:
        with setting.autocast:
            loss = mean(setting.loss(model, batch))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        return float(loss.detach())

    return step


def by_fit(setting: Setting, model: nn.Module, steps: int, on_step: Callable[[Step], None] | None = None) -> None:
    """Train with `loralens.training.fit` itself."""
    course = Course(steps=steps, lr=setting.lr, warmup=0.0)
    fit(model, setting.batches, course=course, loss=setting.loss, watch=Watch(on_step=on_step), **setting.pair)


def in_turn(setting: Setting, *, turns: int, warm: int = 2) -> Turns:
    """The sides take steps in turn, from the same factors on the same batches.

    The time of ``ours`` is everything that `fit` does between two calls of ``on_step``. In this callback, the other
    sides take their steps.
    """
    ours, model = setting.make(), setting.make()
    layers = injected(setting, model)
    others: Mapping[str, Act] = {
        "peft": by_hand(setting, levelled(wrapped(setting, setting.make(), layers.layers), layers)),
        "ours_by_hand": by_hand(setting, model),
    }
    seen, begun = Turns(), setting.wait()

    def take(step: Step) -> None:
        nonlocal begun
        spent, losses = {"ours": setting.wait() - begun}, {"ours": step.loss}
        place = (step.number - 1) % len(setting.batches)
        for side, act in others.items():
            begun = setting.wait()
            losses[side] = act(setting.batches[place])
            spent[side] = setting.wait() - begun
        if step.number > warm:
            seen.tokens.append(setting.tokens[place])
            for side in SIDES:
                seen.seconds[side].append(spent[side])
                seen.losses[side].append(losses[side])
        begun = setting.wait()

    by_fit(setting, ours, turns + warm, take)
    return seen


def alone(setting: Setting, side: str, *, steps: int) -> float:
    """Peak MiB during a few steps of one side: of the whole process; on CUDA, of the memory that torch allocated."""
    import peft

    del peft  # imported on both sides, so that its code counts for neither
    model = setting.make()
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)  # the model was made in float32, which would count
    if side == "ours":
        by_fit(setting, model, steps)
    else:
        names = choose_layers(model, setting.targets, heads=setting.heads)
        act = by_hand(setting, wrapped(setting, model, names))
        for number in range(steps):
            act(setting.batches[number % len(setting.batches)])
    if setting.cuda:
        return torch.cuda.max_memory_allocated(setting.device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def kept(setting: Setting) -> dict[str, int]:
    """The bytes of activations that each side keeps, by side."""
    ours, theirs = setting.make(), setting.make()
    layers = injected(setting, ours)
    return {"ours": saved(setting, ours), "peft": saved(setting, wrapped(setting, theirs, layers.layers))}


def saved(setting: Setting, model: nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass, each storage once, without parameters and buffers."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, Tensor] = {}  # alive until the end, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            held[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), setting.autocast:
        mean(setting.loss(model, setting.batches[0]))
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def mean(found: Any) -> Tensor:
    """The mean loss, from either form that `fit` accepts: the mean itself, or a sum and a count."""
    return found[0] / found[1] if isinstance(found, tuple) else found
