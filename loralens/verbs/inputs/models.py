"""Models that are run: loaded from folders of transformers with their tokenizers, or given as objects."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from loralens.core.messages import warn
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.formats.files.container import CONFIG
from loralens.formats.files.location import existing_path
from loralens.verbs.inputs.choices import FLOAT_TYPES, check_choice
from loralens.verbs.inputs.loaded import Head, Loaded

if TYPE_CHECKING:  # keeps torch out of --help
    from torch import device as Device  # noqa: N812


# What an architecture's name ends in → the class that loads it, and what its logits are.
HEADS: dict[str, tuple[str, Head]] = {
    "ForCausalLM": ("AutoModelForCausalLM", "causal"),
    "LMHeadModel": ("AutoModelForCausalLM", "causal"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "masked"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "classifier"),
}

TASKS = {"AutoModelForCausalLM": "causal-lm", "AutoModelForMaskedLM": "masked-lm"}  # of a head: how --task calls it
CONFIGURED = ("pad_token_id", "use_cache", "output_hidden_states")  # of a model, set while it is run
MANY = 4096  # threads that no machine has; more than an int of C holds would end in torch


# A local transformers folder, a Hub id or a package; or a model of transformers and its tokenizer.
ModelSource = str | PathLike[str] | tuple[Any, Any]


@contextmanager
def restore_settings(source: ModelSource) -> Iterator[None]:
    """What running a model changes is as it was after the block.

    These are the number of torch's threads, what transformers prints, and the mode and the configuration of a model
    that was given as an object.
    """
    torch, transformers = _import_torch()
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    config, settings, modes = None, {}, []
    if isinstance(source, tuple):
        model, _ = _check_pair(source)
        config, modes = model.config, [(layer, layer.training) for layer in model.modules()]
        settings = {name: getattr(config, name) for name in CONFIGURED if hasattr(config, name)}
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for name, value in settings.items():
            setattr(config, name, value)
        for layer, training in modes:
            layer.training = training


def model_label(source: ModelSource) -> str:
    """What a model is called in messages: by its path, an object by its class."""
    return type(source[0]).__name__ if isinstance(source, tuple) else str(source)


def load_model(source: ModelSource, *, device: str, dtype: str, threads: int | None) -> Loaded:
    """A model with the head that its configuration names, and its tokenizer; nothing is downloaded.

    Weights that the folder lacks are made at random from a fixed seed, and a warning names them.

    Parameters
    ----------
    source : path or (model, tokenizer)
        A local transformers folder, a Hub id in the local cache, or a package; or a model of transformers that has been
        loaded, with its tokenizer. That stays on its device and in its dtype.
    device, dtype : str
        Where a folder's model is put, and what it computes in.
    threads : int, optional
        Of the CPU.

    Raises
    ------
    OptionError
        torch or transformers is missing, the device is none, nothing is at the path; a device or a dtype for a model
        that has been loaded.
    FormatError
        No model or no tokenizer can be loaded from there.
    MismatchError
        It is an encoder with a decoder.
    """
    loaded = load_headed(source, None, device=device, dtype=dtype, threads=threads)
    if loaded.missing:
        warn(
            f"{model_label(source)}: {len(loaded.missing)} weights are missing and random here: {loaded.missing[0]} …",
            "trust no number that depends on them, or give a folder that has them",
        )
    return loaded


def load_headed(
    source: ModelSource,
    head: str | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> Loaded:
    """The same with a head of choice: a class of `HEADS`, for classifiers with the names of the labels.

    Weights that the folder lacks, or has for other labels, are random, from ``seed``, and ``missing`` names them.
    """
    torch, transformers = _import_torch()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_choice("dtype", dtype, FLOAT_TYPES)
    if threads and threads > MANY:
        raise OptionError(
            f"--threads {threads} is more than {MANY}", fix="give as many as the machine has, or leave it out"
        )
    torch.set_num_threads(threads or _processor_count())
    # Forked: loading must not change the random numbers of the caller.
    with place(model_label(source)), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        if isinstance(source, tuple):
            _check_not_moved(device, dtype)
            loaded = _wrap_model(source, head, labels)
        else:
            loaded = _from_folder(torch, transformers, existing_path(Path(source)), head, labels, device, dtype)
    config: Any = loaded.model.config
    if config.pad_token_id is None:
        config.pad_token_id = loaded.tokenizer.pad_token_id  # classifiers look for the last token that is none
    # Keys and values would be kept for a text that is never continued.
    config.use_cache = False
    loaded.model.eval()
    return loaded


def _from_folder(
    torch: Any,
    transformers: Any,
    folder: Path,
    head: str | None,
    labels: Sequence[str] | None,
    device: str,
    dtype: str,
) -> Loaded:
    """The model and the tokenizer of a folder."""
    architecture, kind = _model_class(transformers, folder)
    if (folder / CONFIG).exists():  # transformers would switch the adapter on
        raise FormatError(
            f"holds an adapter beside the model ({CONFIG})", fix="move the adapter into a folder of its own"
        )
    target = device_of(device)
    tokenizer = _load_tokenizer(transformers, folder)
    head_options: dict[str, Any] = {}
    if labels is not None:
        numbered = dict(enumerate(labels))
        head_options = {"num_labels": len(labels), "id2label": numbered, "ignore_mismatched_sizes": True}
        head_options["label2id"] = {name: number for number, name in numbered.items()}
    model, info = _load_or_refuse(
        lambda: _load_with_head(
            lambda: getattr(transformers, head or architecture).from_pretrained(
                folder,
                local_files_only=True,
                dtype=getattr(torch, FLOAT_TYPES[dtype]),
                output_loading_info=True,
                **head_options,
            ),
            head,
        ),
        "its model cannot be loaded",
    )
    missing = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    return Loaded(model.to(target), tokenizer, dict(HEADS.values())[head] if head else kind, tuple(sorted(missing)))


def _check_pair(source: tuple[Any, ...]) -> tuple[Any, Any]:
    """A model and its tokenizer, refused where they are something else."""
    torch, transformers = _import_torch()
    model, tokenizer = source if len(source) == 2 else (None, None)
    if not isinstance(model, torch.nn.Module) or not isinstance(
        getattr(model, "config", None), transformers.PreTrainedConfig
    ):
        raise OptionError("this is no model of transformers with its tokenizer", fix="give model=(model, tokenizer)")
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise OptionError(
            f"{type(tokenizer).__name__} is no tokenizer of transformers", fix="give model=(model, tokenizer)"
        )
    return model, tokenizer


def _check_not_moved(device: str, dtype: str) -> None:
    """Refuse a device or a dtype for a model that has been loaded."""
    if device != "auto":
        raise OptionError(f"device={device!r}, and the model has been loaded", fix="move it: model.to(device)")
    if dtype != "f32":
        raise OptionError(f"dtype={dtype!r}, and the model has been loaded", fix="cast it: model.to(dtype)")


def _wrap_model(source: tuple[Any, Any], head: str | None, labels: Sequence[str] | None) -> Loaded:
    """A model that was given as an object, with a copy of its tokenizer that pads on the right."""
    model, tokenizer = _check_pair(source)
    _check_one_stack(model.config)
    kind: Head = ""
    for ending, (_, logits) in HEADS.items():
        if type(model).__name__.endswith(ending):
            kind = logits
    if head is not None and kind != dict(HEADS.values())[head]:
        raise MismatchError(
            f"it has no head of this task, which {head} of transformers loads",
            fix=f"give it with that head, or choose another --task than {TASKS.get(head, 'classification')}",
        )
    own = labels_of(source)
    if labels is not None and own != tuple(labels):
        raise MismatchError(
            f"its labels are {', '.join(own)}, and those of the texts are {', '.join(labels)}",
            fix="give a model whose configuration has these labels (id2label), or the path of its folder",
        )
    return Loaded(model, _pad_right(deepcopy(tokenizer)), kind)


def labels_of(source: ModelSource) -> tuple[str, ...]:
    """The labels of a classifier, in its order; none where the model is no classifier."""
    _, transformers = _import_torch()
    if isinstance(source, tuple):
        config = _check_pair(source)[0].config
        if not type(source[0]).__name__.endswith("ForSequenceClassification"):
            return ()
    else:
        folder = existing_path(Path(source))
        with place(str(source)):
            if _model_class(transformers, folder)[1] != "classifier":
                return ()
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def _import_torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise OptionError(
            f"running a model needs torch and transformers ({error})", fix="pip install 'loralens[train]'"
        ) from error
    return torch, transformers


def _processor_count() -> int:
    """How many processors this process may use; our own entry point has told OpenMP to use one.

    Where torchrun started several processes on this machine, each takes its part.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _model_class(transformers: Any, folder: Path) -> tuple[str, Head]:
    config = _load_or_refuse(
        lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True), "holds no transformers model"
    )
    _check_one_stack(config)
    for architecture in config.architectures or ():
        for ending, class_and_head in HEADS.items():
            if architecture.endswith(ending):
                return class_and_head
    return "AutoModel", ""


def _check_one_stack(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise MismatchError(
            f"{config.model_type} is an encoder with a decoder, and only one stack can be run", fix="give another model"
        )


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    tokenizer = _load_or_refuse(
        lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), "no tokenizer can be loaded"
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where there is no file
        raise FormatError("its tokenizer knows no words", fix="copy the tokenizer's files into the folder of the model")
    return _pad_right(tokenizer)


def _pad_right(tokenizer: Any) -> Any:
    """The tokenizer, set to pad on the right."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FormatError("its tokenizer pads with nothing", fix="set pad_token in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token  # where the attention mask says 0, so it does not matter which
    return tokenizer


def _load_or_refuse(load: Callable[[], Any], what: str) -> Any:
    from safetensors import SafetensorError

    try:
        return load()
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise FormatError(
            f"{what}: its weights are damaged ({_first_line(error)})", fix="copy or download them again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise FormatError(
            f"{what}: {_first_line(error)}", fix="give the folder of a transformers model, with its tokenizer"
        ) from error


def _first_line(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _load_with_head(load: Callable[[], Any], head: str | None) -> Any:
    """A model loaded with a head, where transformers has one of that kind for it."""
    try:
        return load()
    except ValueError as error:
        if head is None or not str(error).startswith("Unrecognized configuration class"):
            raise
        raise MismatchError(
            f"transformers has no {head} of this model",
            fix=f"choose another --task than {TASKS.get(head, 'classification')}, or another model",
        ) from error


def device_of(name: str) -> "Device":
    """The device of a name; ``auto``: a GPU where there is one.

    Raises
    ------
    OptionError
        This machine has none of that name, or torch is missing.
    """
    torch, _ = _import_torch()
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
    try:
        device: Device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"--device {name}: {str(error).splitlines()[0]}"
        raise OptionError(what, fix="give cpu, or a device of this machine") from error
    return device
