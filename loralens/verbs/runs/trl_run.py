"""The backend ``trl``: TRL's trainer with PEFT's layers, which have our first factors, in our loop and with our files.

The loop draws the batches, sets the rates, evaluates and saves the state, as for our own layers. TRL computes the
gradients: its packing, its attention kernels, its loss without logits, its loggers, and PEFT's layers on codes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from logging import ERROR, getLogger
from math import nan
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings

import torch
from torch import Tensor, nn

from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats import save
from loralens.training.course import Course
from loralens.training.feed import Feed
from loralens.training.fitted import Fitted
from loralens.training.initialisation import draw_pair, factor_digest
from loralens.training.injection import RECORDED, Injection, keep_trainable
from loralens.training.loop import Loop, Watch, seeded_generators
from loralens.training.own_loss import own_loss
from loralens.training.readout import copy_numbers, module_of, read_injection
from loralens.training.targets import ExpertStack, LoraOptions, matrix_shape, plan_layers
from loralens.training.world import World
from loralens.watching.view import live

if TYPE_CHECKING:
    from loralens.core.stored import State

ADAPTER = "default"  # PEFT's name of the only adapter of a model


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftLayers(Injection):
    """The layers of PEFT in a model: for the loop what an `Injection` is for our own layers."""

    model: Any
    layers: Mapping[str, Any]
    stored: str  # the dtype or the codes of the weights

    @property
    def weights(self) -> str:
        """The dtype of the frozen weights, or the name of their codes."""
        return self.stored

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of every layer."""
        return {name: layer.r[ADAPTER] for name, layer in self.layers.items()}

    @property
    def frozen(self) -> int:
        """The number of parameters of the original model."""
        trained, every = self.model.get_nb_trainable_parameters()
        return int(every - trained)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, by name."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def groups(self, *, lr: float) -> list[dict[str, Any]]:
        """Parameter groups for an optimiser, as `loralens.training.Injection.groups` makes them."""
        parts: dict[str, list[Tensor]] = {"A": [], "B": [], "magnitude": [], "heads": []}
        for name, parameter in self.tensors().items():
            own = re.search(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\.", name)
            kind = own[1] if own else "heads"
            # Of an embedding B is the factor that is drawn.
            parts[{"embedding_A": "A", "embedding_B": "A", "magnitude_vector": "magnitude"}.get(kind, kind)].append(
                parameter
            )
        return self._as_groups(parts, lr)


def attach_peft(model: nn.Module, options: LoraOptions, *, first_a: Adapter | None = None) -> PeftLayers:
    """Put layers of PEFT into a model, with the first factors that our own layers would have.

    Raises
    ------
    OptionError
        A glob matches nothing, or a number makes no sense.
    MismatchError
        An adapter to start with has other modules or shapes.
    """
    # It warns of kernels that it does not find, in every process on a CPU that could use them.
    getLogger("bitsandbytes").setLevel(ERROR)
    import peft

    method, start = options.row, options.start if isinstance(options.start, Adapter) else None
    plan = plan_layers(model, options, stacks=not (method.magnitude or options.dropout), say=True)
    rank, alpha, dropout, seed = (plan.numbers[name] for name in ("rank", "alpha", "dropout", "seed"))
    undo = ExitStack()
    keep_trainable(model, undo)
    if "forward" in vars(model):
        undo.callback(setattr, model, "forward", vars(model)["forward"])
    stacks = [name for name, kind in plan.kinds.items() if kind is ExpertStack]
    shapes = {n: matrix_shape(plan.named[n], kind, n) for n, kind in plan.kinds.items() if kind is not ExpertStack}
    first: Any = plan.named[next(iter(shapes))].weight
    codes = getattr(getattr(first, "quant_state", None), "quant_type", "int8")
    weights = str(first.dtype).removeprefix("torch.") if first.is_floating_point() else codes
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        # Anchored, since PEFT takes a name for the end of a longer one.
        target_modules="|".join(map(re.escape, shapes)),
        target_parameters=stacks or None,
        rank_pattern={f"^{re.escape(name)}$": own for name, own in plan.ranks.items() if own != rank},
        use_rslora=method.formula == "alpha/sqrt(r)",
        use_dora=method.magnitude,
        lora_dropout=dropout,
        modules_to_save=list(plan.heads) or None,
        task_type="CAUSAL_LM",
    )
    with catch_warnings(action="ignore"):  # PEFT speaks of tied weights, which are not merged here
        if start is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed % 2**63)
                wrapped: Any = peft.get_peft_model(model, config)
        else:
            with TemporaryDirectory() as folder:
                save(start, Path(folder) / "start", format="peft")
                wrapped = peft.PeftModel.from_pretrained(model, Path(folder) / "start", is_trainable=True)
    layers = {name: wrapped.get_base_model().get_submodule(name) for name in shapes}
    digests: dict[str, str] = {}
    for name, layer in layers.items():
        embedding = bool(layer.lora_embedding_A)
        sides = (getattr(layer, f"lora_embedding_{side}" if embedding else f"lora_{side}")[ADAPTER] for side in "AB")
        A, B = (side if embedding else side.weight for side in sides)
        if start is None:
            drawn = draw_pair(
                name, shapes[name], rank=plan.ranks[name], seed=seed, start=method.start, embedding=embedding
            )
            for factor, parameter in ((drawn.A, A), (drawn.B, B)):
                parameter.data = factor.view(parameter.shape).to(parameter.device, torch.float32)
        drawn_factor = B if embedding else A
        if first_a is not None:
            copy_numbers(drawn_factor.data, getattr(module_of(first_a, name), "B" if embedding else "A"), name)
        digests[name] = factor_digest(drawn_factor.flatten(1) if drawn_factor.ndim > 2 else drawn_factor)
        if method.frozen:
            drawn_factor.requires_grad_(False)
    for path, module in wrapped.get_base_model().named_modules():
        # PEFT's wrappers of the parameters of a module are nested, and draw their own factors.
        if hasattr(module, "parameter_name"):
            name = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            layers[name], digests[name] = module, factor_digest(module.lora_A[ADAPTER].weight)
    how = RECORDED.get(method.start, method.start)
    how = "adapter" if start is not None else "A of an adapter" if first_a is not None else how
    # TRL replaces the forward of the model.
    undo.callback(vars(model).pop, "forward", None)
    undo.callback(wrapped.unload)
    heads = {name: plan.named[name] for name in plan.heads}
    return PeftLayers(
        model=wrapped, layers=layers, heads=heads, method=method, **plan.numbers, initialisation=how, digests=digests,
        stored=weights, _undo=undo,
    )  # fmt: skip


@dataclass(eq=False, kw_only=True)
class TrlLoop(Loop):
    """A run whose steps TRL's trainer makes.

    Attributes
    ----------
    rows, evaluated : mapping of str to list
        The columns ``input_ids`` and ``labels``, and ``seq_lengths`` where rows hold several texts; or those of pairs,
        which TRL evaluates too.
    order : callable
        The number of a batch → its rows.
    part : int
        The number of rows that a process takes at a time.
    settings : mapping
        Further fields of TRL's ``SFTConfig`` or ``DPOConfig``.
    beta : float, optional
        The β of DPO; None where texts are learned.
    scratch : str
        A folder for what nobody reads.
    make_folder : callable
        Makes the folder where loggers write.
    """

    tokenizer: Any
    rows: Mapping[str, Any]
    order: Any
    part: int
    settings: Mapping[str, Any]
    scratch: str
    make_folder: Callable[[], Path]
    beta: float | None
    evaluated: Mapping[str, Any] | None
    _tokens: float = 0.0
    _trainer: Any = None
    _seeded: ExitStack = field(default_factory=ExitStack)

    def _wrap_model(self) -> nn.Module:
        from datasets import Dataset
        from transformers import PrinterCallback

        trl: Any = import_module("trl")  # whose types are not exported
        model: nn.Module = self.injection.model
        kind = "SFT" if self.beta is None else "DPO"
        trainer, config = (getattr(trl, f"{kind}{name}") for name in ("Trainer", "Config"))
        wide = {name: parameter.data for name, parameter in self.injection.tensors().items()}
        try:
            with catch_warnings(action="ignore"):
                self._trainer = _trainer_class(trainer, self)(
                    model=model,
                    args=config(**{"report_to": [], **self.settings, **self._config()}),
                    train_dataset=Dataset.from_dict(dict(self.rows)),
                    eval_dataset=Dataset.from_dict(dict(self.evaluated)) if self.evaluated else None,
                    processing_class=self.tokenizer,
                    callbacks=[_callback(self)],
                )
        # What a setting needs may be missing, or two settings may exclude each other.
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            what = f"TRL refuses the run: {(str(error).splitlines() or [type(error).__name__])[0]}"
            raise OptionError(what, fix="give other settings (--trl), or --backend core") from error
        self._trainer.remove_callback(PrinterCallback)
        for name, parameter in model.named_parameters():
            # DPO adds the first factors as an adapter of its own, and PEFT lets other factors be trained then.
            parameter.requires_grad_(name in wide)
            # TRL rounds the factors on codes to bfloat16, in which small steps are lost.
            parameter.data = wide.get(name, parameter.data)
        if self.evaluated:
            self.watch = replace(self.watch, evaluate=self._evaluate_pairs)
        return model

    def _evaluate_pairs(self, model: nn.Module) -> Mapping[str, float]:
        """The loss, the share of pairs with the larger reward for the chosen answer, and the mean margin of rewards."""
        del model  # the trainer has it
        with catch_warnings(action="ignore"):
            measured = self._trainer.evaluate()
        names = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
        return {name: float(measured[f"eval_{theirs}"]) for name, theirs in names.items()}

    @property
    def _watched(self) -> Any:
        return self.injection.model

    def read(self, **options: Any) -> Adapter:
        """The adapter, with the options of `loralens.training.read_injection`."""
        return read_injection(self.injection, view=live(self.injection.model), **options)

    def _train(self) -> None:
        if not self._goes_on:
            return
        self._trainer.args.max_steps = self.course.steps - self.done
        if "report_to" in self.settings:
            self._trainer.args.output_dir = str(self.make_folder())
        self._trainer.optimizer = self._optimiser
        # Each step sets the rates.
        self._trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda _: 1.0)
        with catch_warnings(action="ignore"), self._seeded:
            self._trainer.train()

    def rows_left(self) -> list[int]:
        """The rows of all steps that are left, in order."""
        many = self.course.accumulate * self.world.size
        return [row for number in range(self.done * many, self.course.steps * many) for row in self.order(number)]

    def _config(self) -> dict[str, Any]:
        course, precision = self.course, self._precision
        return {
            "output_dir": self.scratch,
            "max_steps": course.steps,
            "per_device_train_batch_size": self.part,
            "per_device_eval_batch_size": self.part,
            "gradient_accumulation_steps": course.accumulate,
            "max_grad_norm": course.clip,
            "learning_rate": course.lr,
            "seed": self.seed % 2**32,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": self.device.type == "cpu",
            "bf16": precision.autocast and precision.dtype == torch.bfloat16,
            "fp16": precision.autocast and precision.dtype == torch.float16,
            # The loop computes blocks again by itself, which needs no training mode.
            "gradient_checkpointing": False,
            "ddp_find_unused_parameters": False,
            "max_length": None,
            # The loop decides about dropout. The texts are tokens with labels already.
            **(
                {"padding_free": "seq_lengths" in self.rows, "dataset_kwargs": {"skip_prepare_dataset": True}}
                if self.beta is None
                else {"beta": self.beta, "disable_dropout": False}
            ),
        }

    def take_step(self, logs: Mapping[str, Any], begun: float) -> bool:
        """Count a step that the trainer has made, and return whether the run goes on."""
        rate = self.course.lr * self.course.factor(self.done)
        tokens = float(logs.get("num_tokens", 0))
        size, self._tokens = tokens - self._tokens, tokens
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", nan))
        if self._watcher is not None:
            self._watcher.step(final=self.done + 1 == self.course.steps, loss=loss, gradient_norm=norm)
        self._finish_step(loss, rate, norm, size, perf_counter() - begun)
        self._optimiser.zero_grad(set_to_none=True)
        self._after_step()
        return self._goes_on

    def begin_step(self) -> None:
        """Seed dropout and set the rates, as our own loop does before a step."""
        self._seeded.close()
        self._seeded.enter_context(seeded_generators(self.seed, self.done, self.world.rank, self.device))
        self._set_rates(self.done)

    def check_step(self) -> None:
        """Refuse gradients that are not finite, before they are applied."""
        norms = [p.grad.norm() for p in self.injection.tensors().values() if p.grad is not None]
        if not self._precision.scaled and not bool(torch.isfinite(torch.stack(norms)).all()):
            raise self._divergence_error(nan, nan)
        if self.watch.stop is not None:
            stops = self.world.total([float(self.watch.stop())], self.device)
            self.stopped = stops[0] > 0


def fit_with_trl(
    layers: PeftLayers,
    tokenizer: Any,
    rows: Mapping[str, Any],
    order: Callable[[int], Sequence[int]],
    *,
    part: int,
    course: Course,
    watch: Watch,
    state: "State | None",
    settings: Mapping[str, Any],
    beta: float | None,
    evaluated: Mapping[str, Any] | None,
    make_folder: Callable[[], Path],
    device: torch.device,
    base_model: str,
    record: Mapping[str, Any],
) -> Fitted:
    """Train layers of PEFT by TRL's trainer, as `loralens.training.fit` trains ours.

    Raises
    ------
    OptionError
        TRL refuses a setting.
    DivergenceError
        A gradient is not finite. Nothing was updated with it.
    MismatchError
        The state is of another run.
    """
    with TemporaryDirectory() as scratch:
        loop = TrlLoop(
            layers,
            Feed([None]),
            course,
            loss=own_loss,
            world=World.current(),
            watch=watch,
            seed=layers.seed,
            device=device,
            tokenizer=tokenizer,
            rows=rows,
            order=order,
            part=part,
            settings=settings,
            scratch=scratch,
            make_folder=make_folder,
            beta=beta,
            evaluated=evaluated,
        )
        loop.run(state)
    made = {"backend": "trl", **{name: version(name) for name in ("trl", "peft")}, **record}
    return Fitted.of(loop, made, base_model=base_model, task_type="CAUSAL_LM")


def _trainer_class(kind: Any, loop: TrlLoop) -> Any:
    class OurTrainer(kind):  # type: ignore[misc]
        """TRL's trainer with the batches of our loop, and without the dropout of the base."""

        def _get_train_sampler(self, *_: Any) -> Sequence[int]:
            return loop.rows_left()

        def compute_loss(self, model: nn.Module, *inputs: Any, **options: Any) -> Any:
            if model.training and not loop.course.base_dropout:
                for name, module in self.model.named_modules():
                    dropout = "lora_dropout" in name and not name.endswith(".ref")
                    module.training = not name or hasattr(module, "lora_dropout") or dropout
            trained = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            loss = super().compute_loss(model, *inputs, **options)
            # DPO switches to the reference and back, after which PEFT trains every factor.
            for parameter, required in trained:
                parameter.requires_grad_(required)
            return loss

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return OurTrainer


def _callback(loop: TrlLoop) -> Any:
    from transformers import TrainerCallback

    class OurCallback(TrainerCallback):
        """Calls the loop."""

        begun = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = perf_counter()
            loop.begin_step()

        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            loop.check_step()

        def on_log(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            del args, state
            logs = more.get("logs")
            if logs and "loss" in logs:
                control.should_training_stop = not loop.take_step(logs, self.begun)

    return OurCallback()
