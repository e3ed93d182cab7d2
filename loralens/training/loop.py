"""The training loop: computes gradients of batches, updates the parameters, and calls the functions of a `Watch`."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from math import isfinite, nan
from time import perf_counter
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from loralens.core.attached import keep_modes
from loralens.core.training import State
from loralens.errors import DivergenceError, OptionError
from loralens.training.blocks import recompute_blocks
from loralens.training.course import Course
from loralens.training.feed import Feed, move_batch, size_of
from loralens.training.injection import Injection
from loralens.training.number import as_float
from loralens.training.readout import read_injection
from loralens.training.state import capture_state, overwrite, restore_state, run_identity, trained_tensors
from loralens.training.watch import Measures, Step, Watch
from loralens.training.world import World

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a transformers model computes from a batch with labels."""
    if not isinstance(batch, Mapping):
        what = f"a batch is a {type(batch).__name__}, and a model computes its own loss from names and tensors"
        raise OptionError(what, fix="give mappings with labels, or pass loss=")
    loss: Tensor | None = getattr(model(**batch), "loss", None)
    if loss is None:
        raise OptionError("the model returned no loss", fix="put labels into the batches, or pass loss=")
    return loss


@final
@dataclass(slots=True, eq=False)
class Loop:
    """A run while it lasts.

    Attributes
    ----------
    feed : Feed
        Step s takes the batches from s·accumulate·processes on, and process k every so many of them, from number k on.
    loss : callable
        From the model and a batch to a scalar, the mean over the batch; or to a sum and how many it is over: then
        everything in a step weighs alike, however it is cut into batches.
    seed : int
        Of dropout, with the number of the step: no state of a generator has to be kept.
    losses, evaluations : lists
        What was seen: of every step, and of (steps done, measures).
    """

    injection: Injection
    feed: Feed
    course: Course
    loss: Loss
    world: World
    watch: Watch
    seed: int
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Measures]] = field(default_factory=list)
    done: int = 0
    best_step: int | None = None
    _model: nn.Module = field(init=False)
    _optimiser: Optimizer = field(init=False)
    _rates: list[float] = field(init=False)
    _best: dict[str, Tensor] = field(default_factory=dict)
    _best_value: float | None = None
    _waited: int = 0

    def run(self, state: State | None = None) -> None:
        """Train to the end, or until patience is; from a state, where one is given."""
        with _own_generators(self.device), recompute_blocks(self.injection.model, on=self.course.checkpointing):
            self._model = self.world.wrapped(self.injection.model)
            self._prepare(state)
            # A resumed run has its first evaluation already, in its log.
            if state is None:
                self._evaluate()
            while self.done < self.course.steps and not self._out_of_patience:
                self._step()
                self._after_step()
        if self._best:
            tensors = trained_tensors(self.injection)
            for name, tensor in self._best.items():
                overwrite(tensors[name], tensor, name)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.injection.model.parameters()).device

    @property
    def _identity(self) -> dict[str, Any]:
        """What the run is, for its states."""
        return run_identity(self.injection, self.course, processes=self.world.size)

    @property
    def _out_of_patience(self) -> bool:
        return self.watch.patience is not None and self._waited >= self.watch.patience

    def _prepare(self, state: State | None) -> None:
        """The optimiser, without gradients of the caller's or of a run that failed; and what a state says."""
        groups = self.injection.groups(lr=self.course.lr)
        self._optimiser = _optimiser(self.course, groups)
        self._optimiser.zero_grad(set_to_none=True)
        self._rates = [group["lr"] for group in groups]
        if state is not None:
            self._best = restore_state(self.injection, self._optimiser, state, run=self._identity)
            self.done, self._waited = state.step, state.record["waited"]
            self._best_value, self.best_step = state.record["best"], state.record["best_step"]

    def _step(self) -> None:
        begun = perf_counter()
        step, device = self.done, self.device
        _seed_generators(_seed_of_step(self.seed, step, self.world.rank), device)
        rate = self._set_rates(step)
        with _training_mode(self.injection, base_dropout=self.course.base_dropout):
            total, count, size = self._add_gradients(step)
        total, count, size = self.world.total([total, count, size], device)
        parameters = [p for group in self._optimiser.param_groups for p in group["params"] if p.grad is not None]
        with torch.no_grad():  # gradients are of the sum over this process's batches, and means over processes
            torch._foreach_mul_([p.grad for p in parameters], self.world.size / max(count, 1))
        norm = _full_scalar(clip_grad_norm_(parameters, self.course.clip or float("inf")))
        loss = total / max(count, 1) if count else nan  # of a step that asked nothing there is none
        if not isfinite(total) or not isfinite(norm):
            raise self._divergence_error(loss, norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.done += 1
        self.losses.append(loss)
        if self.watch.on_step and self.world.main:
            self.watch.on_step(Step(self.done, loss, rate, norm, int(size), perf_counter() - begun))

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of a step, and return that of the course; a method may let B learn faster."""
        factor = self.course.factor(step)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self.course.lr * factor

    def _add_gradients(self, step: int) -> tuple[float, float, float]:
        """Add up the gradients of this process's batches; the sum of losses, what it is over, and how much went in."""
        # Summed in float64: the loss of a step must not depend on how the step is cut into batches.
        total, count, size = torch.zeros((), dtype=torch.float64, device=self.device), 0.0, 0
        for number in range(self.course.accumulate):
            place = (step * self.course.accumulate + number) * self.world.size + self.world.rank
            batch = self.feed[place]
            size += size_of(batch)
            batch = move_batch(batch, self.device)
            # Processes exchange gradients once a step, with its last batch.
            last = number == self.course.accumulate - 1
            with self.world.gathering(self._model, last=last):
                with self._autocast:
                    result = self.loss(self._model, batch)
                summed, over = _loss_and_count(result)
                summed.backward()  # type: ignore[no-untyped-call]
            total += summed.detach()
            count += over
        return float(total), count, float(size)

    @property
    def _autocast(self) -> Any:
        on = self.device.type == "cuda" if self.course.autocast is None else self.course.autocast
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def _after_step(self) -> None:
        """Evaluate, keep and save what is due."""
        last = self.done == self.course.steps
        if last or _is_due(self.done, self.watch.evaluate_every):
            self._evaluate()
        if self.watch.snapshot and _is_due(self.done, self.watch.snapshot_every):
            adapter = read_injection(self.injection)
            if self.world.main:
                self.watch.snapshot(self.done, adapter)
        # After the last step there is nothing to resume, and the adapter itself is written.
        if self.watch.save and not last and _is_due(self.done, self.watch.save_every):
            record = {"best": self._best_value, "best_step": self.best_step, "waited": self._waited}
            state = capture_state(
                self.injection, self._optimiser, self.done, best=self._best, record=record, run=self._identity
            )
            if self.world.main:
                self.watch.save(state)

    def _evaluate(self) -> None:
        if self.watch.evaluate is None:
            return
        with _evaluation_mode(self.injection.model), self._autocast:
            returned = self.watch.evaluate(self._model)
        if not isinstance(returned, Mapping):
            raise OptionError(
                f"evaluate returned {reprlib.repr(returned)}", fix='return measures by their names: {"loss": 0.5}'
            )
        measures = dict(returned)
        self.world.settle(self._model)
        self.evaluations.append((self.done, measures))
        if self.watch.patience is not None:
            self._keep_best(measures)
        if self.watch.on_evaluation and self.world.main:
            self.watch.on_evaluation(self.done, measures)

    def _keep_best(self, measures: Measures) -> None:
        """Keep what is trained, if it is the best so far."""
        if self.watch.goal not in measures:
            raise OptionError(f"no {self.watch.goal!r} is evaluated", fix=f"choose one of {', '.join(measures)}")
        value = self.world.mean(measures[self.watch.goal], self.device)  # so that all processes decide alike
        if self.watch.better(value, self._best_value):
            self._best = {name: tensor.detach().clone() for name, tensor in trained_tensors(self.injection).items()}
            self._best_value, self.best_step, self._waited = value, self.done, 0
        else:
            self._waited += 1

    def _divergence_error(self, loss: float, norm: float) -> DivergenceError:
        many = self.course.accumulate * self.world.size
        first = self.done * many
        what = f"the loss is {loss}" if not isfinite(loss) else f"the loss is {loss:.4g} and its gradient {norm}"
        batches = f"batch {first}" if many == 1 else f"batches {first} to {first + many - 1}"
        rate = self._set_rates(self.done)
        return DivergenceError(
            f"{what} at step {self.done + 1}, {batches}",
            fix=f"lower the learning rate (it was {rate:.2g}), clip gradients, or look at that batch",
        )


def _optimiser(course: Course, groups: list[dict[str, Any]]) -> Optimizer:
    if course.optimiser == "sgd":
        return SGD(groups, lr=course.lr)
    return AdamW(groups, lr=course.lr, weight_decay=course.weight_decay)


def _loss_and_count(returned: Any) -> tuple[Tensor, float]:
    """A loss and how many it is over, from what a function of a loss returned."""
    loss, over = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, 1)
    number = float(over) if isinstance(over, Tensor) and over.numel() == 1 else as_float(over)
    if not isinstance(loss, Tensor) or number is None:
        raise OptionError(
            f"the loss is {reprlib.repr(returned)}, and no tensor",
            fix="return a tensor of one number; or it and how many it is over",
        )
    _check_loss(loss)
    return loss, number


def _check_loss(loss: Tensor) -> None:
    if loss.ndim:
        raise OptionError(f"the loss has the shape {tuple(loss.shape)}", fix="return one number: its mean, or its sum")
    if not loss.requires_grad:
        raise OptionError(
            "the loss depends on nothing that is trained", fix="compute it from the model's output, with gradients on"
        )


@contextmanager
def _training_mode(injection: Injection, *, base_dropout: bool) -> Iterator[None]:
    """Training mode for the LoRA layers, so that their dropout works; for the model itself only if it is to drop."""
    with keep_modes(injection.model):
        injection.model.train(base_dropout)
        for layer in injection.layers.values():
            layer.training = True
        yield


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients, and the model's own mode again; what is trained stays so, as shards need it."""
    with keep_modes(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def _own_generators(device: torch.device) -> Iterator[None]:
    """The run's own random numbers: those of the caller are as they were, after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def _seed_of_step(seed: int, step: int, rank: int) -> int:
    return int.from_bytes(sha256(f"dropout\0{seed}\0{step}\0{rank}".encode()).digest()[:7], "little")


def _seed_generators(seed: int, device: torch.device) -> None:
    """Seed the generators that a model on a device draws from, and those of no other device."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _full_scalar(tensor: Tensor) -> float:
    """A scalar, put together where it is in shards."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return float(gathered)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
