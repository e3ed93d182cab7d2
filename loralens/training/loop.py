"""The training loop: computes gradients of batches in a precision, updates the parameters, and calls a `Watch`."""

import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from math import ceil, inf, isfinite, log2, nan
from time import perf_counter
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from loralens.core.adapter import Adapter
from loralens.core.attached import keep_modes
from loralens.core.stored import State
from loralens.core.tensors import full_tensor
from loralens.errors import DivergenceError, OptionError
from loralens.training.course import Course, as_float, as_int, make_optimiser
from loralens.training.feed import Feed, move_batch, size_of
from loralens.training.injection import Injection, check_reached
from loralens.training.readout import read_injection
from loralens.training.state import capture_state, overwrite, restore_state, run_identity
from loralens.training.world import World, exact_sums, recompute_blocks

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, Any]]


def loss_and_count(returned: Any) -> tuple[Tensor, Tensor | float]:
    """The loss and the number of its terms, from the return value of a loss function; 1 where it is a mean."""
    loss, over = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, 1)
    number = over.detach().reshape(()) if isinstance(over, Tensor) and over.numel() == 1 else as_float(over)
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad or number is None:
        raise OptionError(
            f"the loss is {reprlib.repr(returned)}, and not one number that depends on what is trained",
            fix="return a tensor, computed from the model's output with gradients on; or a pair of it and the number "
            "of its terms",
        )
    return loss, number


# The numbers of torch.amp.GradScaler. float16 loses gradients below 6e-8, and a power of two rounds nothing.
FIRST = 2.0**16
STEPS = 2000  # steps without an infinite gradient, after which the scale is doubled
SKIPPED = 24  # steps left out in a row, after which the scale is not the reason for infinite gradients


@final
@dataclass(slots=True, eq=False)
class Precision:
    """How a run computes on a device.

    Attributes
    ----------
    autocast : bool
        Whether torch's autocast is on.
    dtype : torch.dtype
        The dtype of autocast.
    scale : float
        The loss is multiplied by it before the backward pass, and the gradients are divided by it. 1 unless the run
        computes in float16; 0 until it is fitted to the size of a batch, see `begin`.
    """

    device: torch.device
    autocast: bool
    dtype: torch.dtype
    scaled: bool
    scale: float
    _good: int = 0  # steps since the scale was last changed
    _skipped: int = 0  # steps in a row that were left out

    @classmethod
    def of(cls, model: nn.Module, device: torch.device, *, autocast: bool | None) -> "Precision":
        """The precision for a model on a device. By default autocast is on only on a CUDA GPU.

        Autocast is to bfloat16, or to float16 where the weights of the model are float16 or the GPU has no bfloat16.
        """
        on = device.type == "cuda" if autocast is None else autocast
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
        dtype = torch.float16 if half or not has_bfloat16(device) else torch.bfloat16
        scaled = half or (on and dtype == torch.float16)
        return cls(device, on, dtype, scaled, scale=float(not scaled))

    def context(self) -> Any:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.autocast)

    def begin(self, terms: float) -> None:
        """Set the first scale, for batches whose loss is a sum over so many terms.

        The loss of a batch is a sum and not a mean, so its gradients are larger by this factor.
        """
        self.scale = FIRST / 2 ** ceil(log2(max(terms, 1)))

    def accepts(self, *, finite: bool) -> bool:
        """Adapt the scale to whether the gradients of a step are finite, and return whether the run goes on.

        An infinite gradient of a scaled loss means that the scale is too large. The step is left out, and the scale
        halved, as `torch.amp.GradScaler` does.
        """
        if not self.scaled:
            return finite
        if not finite:
            self.scale, self._good, self._skipped = self.scale / 2, 0, self._skipped + 1
            return self._skipped <= SKIPPED
        self._good, self._skipped = self._good + 1, 0
        if self._good == STEPS:
            self.scale, self._good = 2 * self.scale, 0
        return True

    @property
    def record(self) -> dict[str, float]:
        """What the state of a run has to remember; nothing without a scale."""
        return {"scale": self.scale, "scale_steps": self._good} if self.scaled else {}

    def restore(self, record: Any) -> None:
        """Go on from the record of a state."""
        if self.scaled and "scale" in record:
            self.scale, self._good = float(record["scale"]), int(record["scale_steps"])


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 itself; older GPUs of CUDA only imitate it, slowly."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere, the first generation that has it


class Step(NamedTuple):
    """One update of the parameters.

    ``number`` counts from 1. ``loss`` is the mean over the terms of the step before the update (over its batches if the
    loss function returns means), ``lr`` the learning rate of the course, ``norm`` the norm of the gradient before it
    was clipped. ``size`` is the number of tokens (of examples, if batches have no attention mask) on all processes, and
    ``seconds`` the duration of the step.
    """

    number: int
    loss: float
    lr: float
    norm: float
    size: int
    seconds: float


class AdapterWatcher(Protocol):
    """What measures the adapter during a run: `loralens.watching.Watcher` does.

    If the model is divided, every process calls its methods, since each factor is gathered; otherwise only the first.
    """

    def watch(self, model: Injection) -> None:
        """Take the layers as they are before training, also if a run is resumed: the state is restored afterwards."""

    def begin(self, step: int) -> object:
        """Take a snapshot before the first step of this call; ``step`` steps were done before."""

    def step(self, *, final: bool = False, loss: float | None = None, gradient_norm: float | None = None) -> object:
        """Count a step of the optimiser, while the gradients are there, and take a snapshot if it is time."""


Measures = Mapping[str, float]  # the loss, accuracy, perplexity … of held-out data


@final
@dataclass(frozen=True, slots=True)
class Watch:
    """Functions that a run calls every so many steps; 0 means never. Of several processes only the first calls them.

    Attributes
    ----------
    on_step : callable, optional
        Called with the `Step` after every step.
    evaluate : callable, optional
        Takes the model and returns measures by name. It is also called before the first and after the last step, in
        evaluation mode and without gradients, and by every process.
    on_evaluation : callable, optional
        Called with the number of steps done and the measures.
    patience : int, optional
        The number of evaluations in a row without a smaller ``loss`` after which the run stops and returns to the best.
    snapshot : callable, optional
        Called with the number of steps done and the adapter at that step.
    save : callable, optional
        Called with the `State`, from which a run can be resumed; also after the last step, so that a finished run can
        go on with more steps.
    watcher : AdapterWatcher, optional
        Measures the adapter before the first step, every so many steps, and after the last:
        ``Watcher(every=50, log="run.jsonl")`` of `loralens.watching`.
    stop : callable, optional
        Asked after every step, and by every process. If one of them gets the answer True, the state is saved and the
        run ends, as a run does that is to be resumed.

    Raises
    ------
    OptionError
        A number of steps is not a whole number; there is a ``patience`` without evaluations during training.
    """

    on_step: Callable[[Step], None] | None = None
    evaluate: Callable[[nn.Module], Measures] | None = None
    on_evaluation: Callable[[int, Measures], None] | None = None
    evaluate_every: int = 0
    patience: int | None = None
    snapshot: Callable[[int, Adapter], object] | None = None
    snapshot_every: int = 0
    save: Callable[[State], None] | None = None
    save_every: int = 0
    watcher: AdapterWatcher | None = None
    stop: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        counts = ("evaluate_every", "snapshot_every", "save_every")
        for name in (*counts, *(["patience"] if self.patience is not None else [])):
            value = getattr(self, name)
            if as_int(value) is None or value < 0:
                raise OptionError(
                    f"{name} {value!r} is not a whole number of 0 or more", fix="give 1, 2 …, or 0 for never"
                )
        # The first and the last evaluation alone would come too late to stop anything.
        if self.patience is not None and (self.evaluate is None or self.evaluate_every < 1 or self.patience < 1):
            raise OptionError(
                "patience needs evaluations during training, and has to be 1 or more",
                fix="give evaluate and evaluate_every, or leave patience out",
            )


@dataclass(eq=False)
class Loop:
    """A training run in progress.

    Attributes
    ----------
    feed : Feed
        The batches of this process. Step s uses those of the turns from s · accumulate on.
    loss : callable
        Takes the model and a batch, and returns a sum and the number of its terms, so that all terms of a step have
        equal weight however the step is divided into batches; or a scalar, so that all batches have equal weight.
    seed : int
        The seed of dropout. Each step derives its own from it, so that no state of a generator has to be saved.
    device : torch.device
        The device of the model, to which it is moved part by part where it is sharded.
    stopped : bool
        Whether the watch has stopped the run before its end.
    losses, evaluations : list
        The loss of every step, and (steps done, measures) of every evaluation.
    """

    injection: Injection
    feed: Feed
    course: Course
    loss: Loss
    world: World
    watch: Watch
    seed: int
    device: torch.device
    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, Measures]] = field(default_factory=list)
    done: int = 0
    best_step: int | None = None
    stopped: bool = False
    _model: nn.Module = field(init=False)
    _optimiser: Optimizer = field(init=False)
    _rates: list[float] = field(init=False)
    _precision: Precision = field(init=False)
    _best: dict[str, Tensor] = field(default_factory=dict)
    _best_value: float | None = None
    _waited: int = 0

    def run(self, state: State | None = None) -> None:
        """Train until the last step or until patience ends, from the beginning or from a state."""
        # The optimiser is made after the model is wrapped, since FSDP2 replaces the parameters.
        with recompute_blocks(self.injection.model, on=self.course.checkpointing), closing(self.feed):
            self._precision = Precision.of(self.injection.model, self.device, autocast=self.course.autocast)
            self._model = self._wrap_model()
            self._prepare(state)
            # A resumed run has its first evaluation already, in its log.
            if state is None:
                self._evaluate()
            self._train()
        # With patience the result is that of the best evaluation, not of the last step.
        if self._best:
            tensors = self.injection.tensors()
            for name, tensor in self._best.items():
                overwrite(tensors[name], tensor, name)

    def _wrap_model(self) -> nn.Module:
        return self.world.wrap(self.injection.model, self.device, narrow=self._gathered_dtype)

    @property
    def _watched(self) -> Any:
        return self.injection

    def read(self, **options: Any) -> Adapter:
        """The adapter, with the options of `loralens.training.read_injection`."""
        return read_injection(self.injection, **options)

    @property
    def _goes_on(self) -> bool:
        patience = inf if self.watch.patience is None else self.watch.patience
        return self.done < self.course.steps and self._waited < patience and not self.stopped

    def _train(self) -> None:
        while self._goes_on:
            self._step()
            self._after_step()

    @property
    def _gathered_dtype(self) -> torch.dtype | None:
        """The dtype in which shards are gathered; None for their own.

        Under autocast a layer keeps a copy of its weight in 16 bits until the backward pass, which would undo the
        sharding. If shards are gathered in these bits, there is no copy. DoRA needs the norms of whole weights.
        """
        on = self._precision.autocast and not self.injection.method.magnitude
        return self._precision.dtype if on else None

    @property
    def _identity(self) -> dict[str, Any]:
        """The identity of the run, which its states contain."""
        return run_identity(self.injection, self.course, processes=self.world.size)

    @property
    def record(self) -> dict[str, Any]:
        """The course and its outcome, for the record in the adapter."""
        outcome = {"steps_done": self.done, "best_step": self.best_step, "processes": self.world.size}
        return {**self.course.record, **outcome}

    def _prepare(self, state: State | None) -> None:
        """Make the optimiser, and restore the state if there is one."""
        groups = self.injection.groups(lr=self.course.lr)
        self._optimiser = make_optimiser(groups, self.course, device=self.device, shard=self.world.shard)
        # The caller, or a run that failed, may have left gradients in the heads.
        self._optimiser.zero_grad(set_to_none=True)
        self._rates = [group["lr"] for group in self._optimiser.param_groups]
        watcher = self._watcher
        if watcher is not None:
            # This comes before the state is restored, since the drift of A is measured from its start.
            watcher.watch(self._watched)
        if state is not None:
            self._best = restore_state(self.injection, self._optimiser, state, run=self._identity)
            self.done, self._waited = state.step, state.record["waited"]
            self._best_value, self.best_step = state.record["best"], state.record["best_step"]
            self._precision.restore(state.record)
        if watcher is not None:
            watcher.begin(self.done)

    @property
    def _watcher(self) -> AdapterWatcher | None:
        """The watcher, where this process has to call it: in the first one, and in all if the model is sharded."""
        return self.watch.watcher if self.world.main or self.world.shard else None

    def _step(self) -> None:
        begun = perf_counter()
        step, device = self.done, self.device
        # Before the generators are seeded: batches may be drawn from those of the caller.
        first = step * self.course.accumulate
        batches = [self.feed[turn] for turn in range(first, first + self.course.accumulate)]
        rate = self._set_rates(step)
        # Each process draws its own dropout, since it has other texts.
        with (
            seeded_generators(self.seed, step, self.world.rank, device),
            _training_mode(self.injection, base_dropout=self.course.base_dropout),
        ):
            total, count, size = self._add_gradients(batches)
        # Before the next exchange between processes, for which those whose gradients are all there have to wait.
        if self.world.parallel or self.world.main:
            check_reached(self.injection, parallel=self.world.parallel, first=not self.losses)
        stop_asked = self.watch.stop is not None and self.watch.stop()
        # With the sums, so that it costs nothing to agree whether any process is to stop.
        total, count, size, stops = self.world.total([total, count, size, float(stop_asked)], device)
        self.stopped = stops > 0
        parameters = [p for group in self._optimiser.param_groups for p in group["params"] if p.grad is not None]
        # The backward pass gave the gradient of the sum over this process's batches, and DDP and FSDP2 took the mean
        # over processes. The gradient of the mean over the step is that times processes / count.
        with torch.no_grad():
            scale = self.world.size / max(count, 1) / self._precision.scale
            torch._foreach_mul_([p.grad for p in parameters], scale)
        # With an infinite limit the norm is computed, and nothing is clipped.
        norm = float(full_tensor(clip_grad_norm_(parameters, self.course.clip or inf)))
        loss = total / max(count, 1) if count else nan  # a step in which no token was hidden has no loss
        if not isfinite(total) or not self._precision.accepts(finite=isfinite(norm)):
            raise self._divergence_error(loss, norm)
        if isfinite(norm):
            self._optimiser.step()
        seconds = perf_counter() - begun
        # While the gradients are there.
        if self._watcher is not None:
            self._watcher.step(final=step + 1 == self.course.steps, loss=loss, gradient_norm=norm)
        self._optimiser.zero_grad(set_to_none=True)
        self._finish_step(loss, rate, norm, size, seconds)

    def _finish_step(self, loss: float, rate: float, norm: float, size: float, seconds: float) -> None:
        self.done += 1
        self.losses.append(loss)
        if self.watch.on_step and self.world.main:
            self.watch.on_step(Step(self.done, loss, rate, norm, int(size), seconds))

    def _set_rates(self, step: int) -> float:
        """Set the learning rates of a step, and return the rate of the course; that of B may be larger (LoRA+)."""
        factor = self.course.factor(step)
        for group, rate in zip(self._optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self.course.lr * factor

    def _add_gradients(self, batches: list[Any]) -> tuple[float, float, float]:
        """Add up the gradients of this process's batches in a step.

        Returns the sum of the losses, the number of terms in it, and the size of the batches (see `size_of`).
        """
        # Summed in float64: the loss of a step must not depend on how the step is divided into batches.
        sums, size = exact_sums(2, self.device), 0
        for number, batch in enumerate(batches):
            size += size_of(batch)
            batch = move_batch(batch, self.device)
            # Processes exchange gradients once a step, with its last batch.
            last = number == len(batches) - 1
            with self.world.gathering(self._model, last=last):
                with self._precision.context():
                    result = self.loss(self._model, batch)
                summed, over = loss_and_count(result)
                if not self._precision.scale:
                    # The mean over processes, so that all have one scale.
                    self._precision.begin(self.world.mean(float(over), self.device))
                (summed * self._precision.scale).backward()  # type: ignore[no-untyped-call]
            # Both stay on the device: float() here would wait for the GPU after every batch.
            sums[0] += summed.detach().to(sums.device)
            sums[1] += over.to(sums.device) if isinstance(over, Tensor) else over
        total, count = sums.tolist()
        return total, count, float(size)

    def _after_step(self) -> None:
        """Evaluate, take a snapshot and save the state, where each is due."""
        last = self.done == self.course.steps
        # The evaluation comes before the state is saved, which contains the best evaluation so far.
        if last or _is_due(self.done, self.watch.evaluate_every):
            self._evaluate()
        if self.watch.snapshot and _is_due(self.done, self.watch.snapshot_every):
            adapter = self.read()
            if self.world.main:
                self.watch.snapshot(self.done, adapter)
        # The state after the last step is that from which a run goes on with more steps.
        due = _is_due(self.done, self.watch.save_every) or (last and self.watch.save_every > 0)
        if self.watch.save and (due or self.stopped):
            record = {"best": self._best_value, "best_step": self.best_step, "waited": self._waited}
            record |= self._precision.record
            state = capture_state(
                self.injection, self._optimiser, self.done, best=self._best, record=record, run=self._identity
            )
            if self.world.main:
                self.watch.save(state)

    def _evaluate(self) -> None:
        if self.watch.evaluate is None:
            return
        model = self.injection.model
        # Unlike in `frozen_evaluation` of core, what is trained keeps requires_grad, which shards need.
        with keep_modes(model), torch.no_grad(), self._precision.context():
            model.eval()
            returned = self.watch.evaluate(self._model)
        if not isinstance(returned, Mapping):
            raise OptionError(
                f"evaluate returned {reprlib.repr(returned)}", fix='return measures by their names: {"loss": 0.5}'
            )
        measures = dict(returned)
        # The optimiser expects shards, which only a backward pass would have restored.
        self.world.settle(self._model)
        self.evaluations.append((self.done, measures))
        if self.watch.patience is not None:
            self._keep_best(measures)
        if self.watch.on_evaluation and self.world.main:
            self.watch.on_evaluation(self.done, measures)

    def _keep_best(self, measures: Measures) -> None:
        """Keep a copy of the trained tensors, if the evaluation is the best so far."""
        if "loss" not in measures:
            raise OptionError("patience needs the loss, which evaluate did not return", fix="return it as well")
        # The mean, so that all processes decide alike.
        value = self.world.mean(measures["loss"], self.device)
        # Strictly better, so that patience ends also if the measure stays the same; NaN never is.
        if value < (inf if self._best_value is None else self._best_value):
            self._best = {name: tensor.detach().clone() for name, tensor in self.injection.tensors().items()}
            self._best_value, self.best_step, self._waited = value, self.done, 0
        else:
            self._waited += 1

    def _divergence_error(self, loss: float, norm: float) -> DivergenceError:
        # All batches of the step are named, since the loss of a step is one number.
        many = self.course.accumulate * self.world.size
        first = self.done * many
        what = f"the loss is {loss}" if not isfinite(loss) else f"the loss is {loss:.4g} and its gradient {norm}"
        batches = f"batch {first}" if many == 1 else f"batches {first} to {first + many - 1}"
        rate = self._set_rates(self.done)
        return DivergenceError(
            f"{what} at step {self.done + 1}, {batches}",
            fix=f"lower the learning rate (it was {rate:.2g}), clip gradients, or look at that batch",
        )


@contextmanager
def _training_mode(injection: Injection, *, base_dropout: bool) -> Iterator[None]:
    """Training mode for the LoRA layers, whose dropout it switches on; for the model only with ``base_dropout``."""
    with keep_modes(injection.model):
        injection.model.train(base_dropout)
        for layer in injection.layers.values():
            layer.training = True
        yield


@contextmanager
def seeded_generators(seed: int, step: int, rank: int, device: torch.device) -> Iterator[None]:
    """Within the context, a model on a device draws from the generators of one step; those of the caller stay."""
    # A hash, since seed + step would give the steps of two runs the same dropout. 7 of its bytes, since torch takes a
    # seed of at most 64 bits.
    number = int.from_bytes(sha256(f"dropout\0{seed}\0{step}\0{rank}".encode()).digest()[:7], "little")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would seed all devices, also those that other code uses.
        torch.default_generator.manual_seed(number)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(number)
        elif device.type == "mps":
            torch.mps.manual_seed(number)
        yield


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
