"""The verb ``train``: trains LoRA layers of a local model on texts, and writes the adapter."""

from collections.abc import Mapping, Sequence
from inspect import signature
from os import PathLike

from loralens.choices import BaseDtype, MethodName, Optimiser, ScaleRule, Schedule, StartName, TaskName
from loralens.errors import OptionError
from loralens.training.course import MakeOptimiser
from loralens.verbs.models.models import ModelSource, restore_settings
from loralens.verbs.models.texts import TextSource
from loralens.verbs.runs.grid import GridResult, train_grid
from loralens.verbs.runs.grid_axes import Grid
from loralens.verbs.runs.train_adapter import train_adapter
from loralens.verbs.runs.training_options import fill_in
from loralens.verbs.runs.training_result import TrainPlan, TrainResult
from loralens.verbs.shared.adapters import AdapterSource


def train(
    *,
    model: ModelSource | None = None,
    task: TaskName | None = None,
    data: TextSource | None = None,
    eval: TextSource | None = None, eval_limit: int | None = None,
    output: str | PathLike[str] | None = None,
    demo: bool = False,
    targets: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    heads: str | Sequence[str] = (),
    rank: int = 8,
    rank_pattern: str | Sequence[str] | Mapping[str, int] = (),
    alpha: float = 16.0,
    method: MethodName = "lora",
    scale_rule: ScaleRule | None = None, start: StartName | None = None, magnitude: bool | None = None,
    lr_ratio: float | None = None, freeze_a: bool | None = None,
    dropout: float = 0.0, base_dropout: bool = False,
    steps: int | None = None, epochs: float | None = None,
    batch: int | None = None, accumulate: int = 1, length: int | None = None,
    mask_prompt: bool = True, pack: bool = False, group_by_length: bool = False,
    lr: float | None = None,
    schedule: Schedule | None = None,
    warmup: float = 0.05,
    optimiser: Optimiser | MakeOptimiser = "adamw",
    beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0,
    clip: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    dtype: BaseDtype | None = None,
    autocast: bool | None = None,
    threads: int | None = None,
    checkpointing: bool = False,
    shard: bool = False,
    evaluate_every: int | None = None, patience: int | None = None, snapshots: int | None = None,
    watch: int | None = None,
    save_every: int = 50,
    resume: bool = False, more_steps: int | None = None,
    start_from: AdapterSource | None = None, first_a: AdapterSource | None = None,
    grid: Grid = (), jobs: int | None = None,
    overwrite: bool = False, dry_run: bool = False,
) -> TrainResult | TrainPlan | GridResult:  # fmt: skip
    """Train LoRA layers on texts, and write the adapter.

    During the run its files are in ``OUTPUT.unfinished``: the log, the snapshots, and the state from which ``resume``
    continues. On one machine, a run that was killed and resumed ends with the same bytes.

    Parameters
    ----------
    model : path or (model, tokenizer)
        The base: a transformers folder, a Hub id in the local cache, or a package; or a model of transformers and its
        tokenizer, which is left as it was.
    task : str
        ``classification``, ``causal-lm`` or ``masked-lm``.
    data, eval : path, name of a corpus, or iterable
        The texts to learn from, and to evaluate on: a ``.jsonl``, ``.csv``, ``.tsv``, ``.parquet`` or ``.txt`` file, a
        folder of ``datasets``, or a list of texts or of (text, label) pairs. ``data`` may also be the name of a corpus:
        ``reuters-r8``, ``20newsgroups``, ``tweet-author``, ``tweet-sentiment``. Its held-out texts are evaluated on by
        default. For ``causal-lm`` a record may have ``prompt`` and ``completion``, or ``messages``, instead of
        ``text``.
    eval_limit : int, optional
        Evaluate on the first ``eval_limit`` texts only.
    output : path
        The folder of the run and of the adapter; needed unless ``dry_run``.
    demo : bool
        Train on Reuters R8 with MiniLM; fills in every option that is not given.
    targets, heads : str or sequence of str
        Globs over names or kinds, several in one string with commas between them: of the layers that are adapted (all
        linear ones by default), and of the modules that are trained in full (a classifier and what is new, by default).
    exclude : str or sequence of str
        Globs, as in ``targets``, for modules in which nothing is adapted.
    rank, alpha : int and float
        The rank r of every update, and the α of its scale α/r. A layer that is narrower gets the rank that it allows.
    rank_pattern : str, sequence of str, or mapping of str to int
        Other ranks for the layers that match a glob: ``"down_proj=4"``, several of them, or ``{"down_proj": 4}``.
    method : str
        ``lora``, ``rslora``, ``lora+``, ``dora``, ``pissa``, ``olora``, ``lora-ga`` or ``frozen-a``: short names of
        combinations of the next five options, each of which replaces what the method has.
    scale_rule, start, magnitude, lr_ratio, freeze_a : optional
        The scale ``lora`` (α/r) or ``rslora`` (α/√r); the first factors ``kaiming``, ``gaussian``, ``pissa``,
        ``olora`` or ``lora-ga``; whether the length of every output is trained (DoRA); the learning rate of B divided
        by that of A; whether A is not trained.
    dropout, base_dropout : float and bool
        The probability of dropout on the input of every A; whether the model's own dropout stays switched on.
    steps, epochs : int and float, optional
        The number of updates of the weights, or of passes over the texts; by default one pass.
    batch, accumulate, length : int
        The number of texts in a step, over all processes (16 by default); of parts into which a step is cut to save
        memory; of tokens after which a text is cut (256 by default).
    mask_prompt : bool
        Whether only completions and the answers of the assistant are learned, and not what they answer.
    pack, group_by_length : bool
        Put several texts into a row of ``length`` tokens, in which they do not see each other (``batch`` then counts
        rows); or put texts of similar lengths into a batch.
    lr, schedule, warmup : float, str and float
        The highest learning rate (5e-4 by default); how it changes after the warm-up, ``constant`` (the default),
        ``linear`` or ``cosine``; the share of the steps in which it rises from 0.
    optimiser : str or callable
        ``adamw``, ``sgd`` without momentum, or ``muon`` for the factors beside ``adamw`` for everything else. Or a
        function that takes parameter groups and returns an optimiser of torch: ``torch.optim.RAdam``.
    beta1, beta2, epsilon, weight_decay : float
        β₁, β₂, ε and the weight decay of ``adamw``; ``muon`` has the weight decay too.
    clip : float
        The norm above which the gradient is scaled down, where 0 never scales it.
    seed : int
        Seed of the random numbers for A, new heads, the order of the texts, and dropout.
    device, dtype : str
        The device and the dtype of a model that is loaded from a folder. By default the dtype is ``bf16`` on a GPU of
        CUDA (``f16`` if it has no bfloat16), and ``f32`` elsewhere; factors and heads are float32. ``nf4`` and ``int8``
        are codes that bitsandbytes makes of the weights (QLoRA).
    autocast : bool, optional
        Whether to compute in 16 bits under torch's autocast; by default on a GPU of CUDA alone.
    threads : int, optional
        The number of CPU threads; by default all that the process may use.
    checkpointing, shard : bool
        Compute activations a second time in the backward pass, to save memory; divide the model among all processes
        (FSDP2).
    evaluate_every, patience : int, optional
        The number of steps between evaluations (by default only before and after training); stop after this many
        evaluations in a row without a better one.
    snapshots : int, optional
        Keep the adapter every ``snapshots`` steps.
    watch : int, optional
        Look at the adapter every ``watch`` steps (see `loralens.watching.Watcher`): its norms, ranks and directions
        are written to ``watch.jsonl`` in the folder of the run, and signs that the run goes wrong are warned of.
    save_every : int
        The number of steps after which the state of the run is saved, for ``resume``.
    resume, overwrite, dry_run : bool
        Continue the unfinished run of ``output``; replace what is there; check everything and return the plan.
    more_steps : int, optional
        Continue the finished run of ``output`` for so many steps, with the same options otherwise. The learning rate is
        that of a run which has all these steps.
    start_from : path or Adapter, optional
        An adapter with whose factors, heads and magnitudes the run starts. The run has its modules, ranks and α, but it
        is a new run: the optimiser begins anew.
    first_a : path or Adapter, optional
        An adapter with whose A the run starts, while B starts at 0. Its ranks must be those of the run.
    grid : str, mapping, or sequence of these
        Train one adapter for every combination of values of options: ``{"rank": [1, 8], "seed": range(5)}``, or as on
        the command line ``["rank=1,8", "seed=0..4"]``. Several mappings are several grids in one folder. ``output`` is
        the folder of all runs; runs that are done there are not repeated. The result is a `GridResult`.
    jobs : int, optional
        The number of runs of a grid that are trained at a time; 1 by default, since each has a model in memory.

    Raises
    ------
    OptionError
        A value that makes no sense, a file that is not there, an output that is in the way; torch is not installed.
    FormatError
        A model or texts that cannot be read.
    MismatchError
        The task does not fit the model; ``resume`` with other options than the run has.
    DivergenceError
        The loss is no longer finite: its texts and the last good snapshot are named.
    """
    # These are all options by name, since nothing else is in the scope of the function yet.
    keywords = dict(locals())
    grid, jobs = keywords.pop("grid"), keywords.pop("jobs")
    if grid:
        defaults = {name: parameter.default for name, parameter in signature(train).parameters.items()}
        fixed = {name for name, value in keywords.items() if value is not defaults[name] and value != defaults[name]}
        return train_grid(keywords, grid, jobs=jobs, fixed=fixed)
    if jobs is not None:
        raise OptionError("--jobs is the number of runs of a grid at a time", fix="leave it out, or give --grid")
    options = fill_in(keywords)
    options.check()
    # The settings of torch and transformers, and a model that was given as an object, belong to the caller.
    with restore_settings(options.model):
        return train_adapter(options)
