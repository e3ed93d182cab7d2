"""Prepares models for running: loads them with their tokenizers from folders, or takes them as objects."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from loralens.choices import CODES, FLOAT_TYPES, FloatType
from loralens.core.attached import keep_modes
from loralens.core.messages import warn
from loralens.core.threads import processor_count
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, place
from loralens.exports import Options
from loralens.formats.files.container import CONFIG, read_json
from loralens.formats.files.outside import check_folder
from loralens.formats.models.model_files import gguf_paths, model_path
from loralens.requirements import missing_packages
from loralens.verbs.models.loaded import Head, Loaded
from loralens.verbs.models.texts import TextSource
from loralens.verbs.shared.options import check_choice, check_counts

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812
    from torch import nn


# The end of the name of an architecture → the class of transformers that loads it, and the kind of its logits.
HEADS: dict[str, tuple[str, Head]] = {
    "ForCausalLM": ("AutoModelForCausalLM", "causal"),
    "LMHeadModel": ("AutoModelForCausalLM", "causal"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "masked"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "classifier"),
}

# Without trust_remote_code, transformers asks on standard input whether the Python code of a folder may run.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
CONFIGURED = ("pad_token_id", "use_cache", "output_hidden_states")  # settings of a model that are changed for running
BASE_CONFIG = "config.json"
STORED_CODES = {"quantization_config", "quantization"}  # what it says about quantised weights; the second is of MLX
LOADING = ("device_map", "attn_implementation")  # arguments of ``from_pretrained`` that users may give
MANY = 4096  # threads, more than any machine has; a number above the largest C int would be a traceback in torch


# A local transformers folder, a Hub id or a package; or a model of transformers and its tokenizer.
ModelSource = str | PathLike[str] | tuple[Any, Any]


@contextmanager
def restore_settings(source: ModelSource) -> Iterator[None]:
    """Restore after the block the settings that running a model changes.

    These are the number of torch's threads, the verbosity of transformers, and the mode and the configuration of a
    model that was given as an object.
    """
    torch, transformers = _import_torch()
    threads, verbosity = torch.get_num_threads(), transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    config: Any = None
    settings: dict[str, Any] = {}
    modes: AbstractContextManager[None] = nullcontext()
    if isinstance(source, tuple):
        model, _ = _check_pair(source)
        config, modes = model.config, keep_modes(model)
        settings = {name: getattr(config, name) for name in CONFIGURED if hasattr(config, name)}
    try:
        with modes:
            yield
    finally:
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for name, value in settings.items():
            setattr(config, name, value)


def model_label(source: ModelSource) -> str:
    """The name of a model in messages: its path, or the class of an object."""
    return type(source[0]).__name__ if isinstance(source, tuple) else str(source)


def load_model(source: ModelSource, *, device: str, dtype: str, threads: int | None) -> Loaded:
    """The model with the head that its configuration names, and its tokenizer; nothing is downloaded.

    Weights that are missing in the folder are drawn at random from a fixed seed, and a warning names them.

    Parameters
    ----------
    source : path or (model, tokenizer)
        A local transformers folder, a Hub id in the local cache, or a package; or a model of transformers that has been
        loaded, with its tokenizer. Such a model stays on its device and in its dtype. Quantised weights of a folder are
        decoded.
    device, dtype : str
        The device and the dtype of a model that is loaded from a folder.
    threads : int, optional
        The number of CPU threads; by default all that the process may use.

    Raises
    ------
    OptionError
        torch or transformers is not installed; there is no such device; nothing is at the path; a device or a dtype is
        given for a model that has been loaded.
    FormatError
        No model or no tokenizer can be loaded from the path.
    MismatchError
        The model is an encoder with a decoder.
    """
    loaded = load_headed(in_floats(source), None, device=device, dtype=dtype, threads=threads)
    if loaded.missing:
        warn(
            f"{model_label(source)}: {len(loaded.missing)} weights are missing and random here: {loaded.missing[0]} …",
            "do not rely on numbers that depend on them, or give a folder that has them",
        )
    return loaded


def in_floats(source: ModelSource) -> ModelSource:
    """The source; for a folder of quantised weights its copy in floats, since adapters are not applied to codes."""
    if isinstance(source, tuple):
        return source
    folder = model_path(Path(source))
    try:
        config = read_json(folder / BASE_CONFIG)
    except LoraLensError:  # which loading says better
        return source
    if not STORED_CODES & config.keys():
        return source
    # Imported here because it imports the readers of models, which other calls do not need.
    from loralens.formats.models.base_cache import float_copy
    from loralens.formats.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(folder)
    return float_copy(folder.name, folder, checkpoint.tensors) if checkpoint.coded or checkpoint.float8 else source


def load_headed(
    source: ModelSource,
    head: str | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
    loading: Mapping[str, Any] = {},
) -> Loaded:
    """Like `load_model`, with a chosen head: a class of `HEADS`, and for a classifier the names of its labels.

    Weights that are missing in the folder, or are for other labels, are drawn from ``seed``; ``missing`` names them.
    """
    torch, transformers = _import_torch()
    # The messages and bars of transformers would mix with ours, and speak of weights that are expected to be missing.
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    check_choice("dtype", dtype, FLOAT_TYPES if head is None else (*FLOAT_TYPES, *CODES))
    # Such a name is that of a kernel of the Hub, whose code would run here; a run file may come from anybody.
    if "/" in str(loading.get("attn_implementation", "")):
        raise OptionError("attn_implementation names code of the Hub, which never runs", fix="give sdpa or eager")
    if threads and threads > MANY:
        raise OptionError(
            f"--threads {threads} is more than {MANY}", fix="give as many as the machine has, or leave the option out"
        )
    torch.set_num_threads(threads or _torch_threads())
    # Forked, since loading must not change the random numbers of the caller.
    with place(model_label(source)), torch.random.fork_rng(devices=[]):
        # Modulo, since a seed of Python may be larger than torch's.
        torch.manual_seed(seed % 2**63)
        if isinstance(source, tuple):
            # These are the defaults: any other value asks for a change of the user's object.
            for name, value, default in (("device", device, "auto"), ("dtype", dtype, "f32")):
                if value != default:
                    what = f"{name}={value!r} cannot be applied to a model that has been loaded"
                    raise OptionError(what, fix=f"convert it before: model.to({name}), and leave {name} out")
            loaded = _wrap_model(source, head, labels)
        else:
            loaded = _from_folder(transformers, _model_folder(source), head, labels, device, dtype, loading)
    config: Any = loaded.model.config
    if config.pad_token_id is None:
        # Classifiers on causal models take the logits of the last token that is not padding.
        config.pad_token_id = loaded.tokenizer.pad_token_id
    # A cache of keys and values would cost memory for texts that are never continued.
    config.use_cache = False
    loaded.model.eval()
    return loaded


def _from_folder(
    transformers: Any,
    folder: Path,
    head: str | None,
    labels: Sequence[str] | None,
    device: str,
    dtype: str,
    loading: Mapping[str, Any],
) -> Loaded:
    """The model and the tokenizer of a folder."""
    architecture, kind = _model_class(transformers, folder)
    # transformers would load the adapter too, and the model would not be the base.
    if (folder / CONFIG).exists():
        raise FormatError(
            f"holds an adapter beside the model ({CONFIG})", fix="move the adapter into a folder of its own"
        )
    target = device_of(device)
    tokenizer = _load_tokenizer(transformers, folder)
    head_options: dict[str, Any] = {}
    if labels is not None:
        numbered = dict(enumerate(labels))
        # A head for other labels is replaced by a random one, which the loading info names.
        head_options = {"num_labels": len(labels), "id2label": numbered, "ignore_mismatched_sizes": True}
        head_options["label2id"] = {name: number for number, name in numbered.items()}
    options = {**weight_options(dtype, target), **head_options, **loading}
    model, info = _load_or_refuse(
        lambda: getattr(transformers, head or architecture).from_pretrained(
            folder, **LOCAL, output_loading_info=True, **options
        ),
        "its model cannot be loaded",
        head=head,
    )
    # Releases of transformers differ in whether a mismatched key comes alone or with its two shapes.
    missing = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    if dtype not in CODES and "device_map" not in loading:  # which are on the device already
        model = model.to(target)
    for module in model.modules():
        # On a CPU, bitsandbytes would put codes into another order when it is called without gradients, in which its
        # products differ and have no gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return Loaded(model, tokenizer, dict(HEADS.values())[head] if head else kind, tuple(sorted(missing)))


def _check_pair(source: tuple[Any, ...]) -> tuple[Any, Any]:
    """The model and its tokenizer, after a check that they are that."""
    torch, transformers = _import_torch()
    model, tokenizer = source if len(source) == 2 else (None, None)
    kinds = torch.nn.Module, transformers.PreTrainedConfig, transformers.PreTrainedTokenizerBase
    if not all(map(isinstance, (model, getattr(model, "config", None), tokenizer), kinds)):
        what = "model is not a pair of a transformers model and its tokenizer"
        raise OptionError(what, fix="give model=(model, tokenizer)")
    return model, tokenizer


def _task_of(head: str) -> str:
    return "causal-lm" if head == "AutoModelForCausalLM" else "classification"


def _wrap_model(source: tuple[Any, Any], head: str | None, labels: Sequence[str] | None) -> Loaded:
    """A model that was given as an object, with a copy of its tokenizer, which is set to pad on the right."""
    model, tokenizer = _check_pair(source)
    _check_one_stack(model.config)
    kind = _class_for(type(model).__name__)[1]
    if head is not None and kind != dict(HEADS.values())[head]:
        raise MismatchError(
            f"it does not have the head for this task, which {head} of transformers loads",
            fix=f"load it with {head}, or choose another --task than {_task_of(head)}",
        )
    own = labels_of(source)
    if labels is not None and own != tuple(labels):
        raise MismatchError(
            f"its labels are {', '.join(own)}, but those of the texts are {', '.join(labels)}",
            fix="give a model whose configuration has these labels (id2label), or the path of its folder",
        )
    return Loaded(model, _pad_right(deepcopy(tokenizer)), kind)


def labels_of(source: ModelSource) -> tuple[str, ...]:
    """The labels of a classifier, in the order of its logits; none if the model is not a classifier."""
    _, transformers = _import_torch()
    if isinstance(source, tuple):
        config = _check_pair(source)[0].config
        if not type(source[0]).__name__.endswith("ForSequenceClassification"):
            return ()
    else:
        folder = _model_folder(source)
        with place(str(source)):
            if _model_class(transformers, folder)[1] != "classifier":
                return ()
            config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def _model_folder(source: str | PathLike[str]) -> Path:
    """The folder of transformers that a path or a name means; for a GGUF model, its `float_folder`."""
    folder = model_path(Path(source))
    check_folder(folder)
    paths = gguf_paths(folder)
    if not paths:
        return folder
    # Imported here because it imports the readers and writers of models, which other calls do not need.
    from loralens.formats.models.base_cache import float_folder

    # transformers runs floats, so the weights are decoded once, as those of a package that holds a GGUF file.
    return float_folder(Path(source).name, paths)


def _import_torch() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise missing_packages("running a model", ("torch", "transformers"), error) from error
    return torch, transformers


def _torch_threads() -> int:
    """The number of processors for this process, which torch cannot know: our entry point sets OpenMP to one thread.

    If torchrun has started several processes on this machine, each gets its share.
    """
    processors = processor_count()
    return max(1, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _class_for(*architectures: str) -> tuple[str, Head]:
    """The class of transformers for the first architecture with a known head, and the kind of its logits."""
    for architecture in architectures:
        for ending, class_and_head in HEADS.items():
            if architecture.endswith(ending):
                return class_and_head
    return "AutoModel", ""


def _model_class(transformers: Any, folder: Path) -> tuple[str, Head]:
    config = _load_or_refuse(
        lambda: transformers.AutoConfig.from_pretrained(folder, **LOCAL), "holds no transformers model"
    )
    _check_one_stack(config)
    # transformers would download the code of this kernel, and run it.
    if "/" in str(config._attn_implementation):
        what = f"its config.json names a kernel of the Hub, {ascii(config._attn_implementation)[:100]}"
        raise FormatError(f"{what}, and loralens runs no code from a model", fix="take attn_implementation out of it")
    architectures = config.architectures or ()
    if not isinstance(architectures, list | tuple) or not all(isinstance(name, str) for name in architectures):
        what = f"its config.json has architectures that are not names: {ascii(architectures)[:100]}"
        raise FormatError(what, fix="download the configuration of the model again")
    return _class_for(*architectures)


def _check_one_stack(config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise MismatchError(
            f"{config.model_type} is an encoder with a decoder, but only a model of one stack can be run",
            fix="give another model",
        )


def _load_tokenizer(transformers: Any, folder: Path) -> Any:
    tokenizer = _load_or_refuse(
        lambda: transformers.AutoTokenizer.from_pretrained(folder, **LOCAL), "no tokenizer can be loaded"
    )
    # transformers makes an empty tokenizer if there is no file.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FormatError("its tokenizer knows no words", fix="copy the tokenizer's files into the folder of the model")
    return _pad_right(tokenizer)


def _pad_right(tokenizer: Any) -> Any:
    """The tokenizer, set to pad on the right, so that positions are those of a text alone."""
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FormatError("its tokenizer has no token for padding", fix="set pad_token in tokenizer_config.json")
        # Any token would do, since the attention mask is 0 there.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_or_refuse(load: Callable[[], Any], what: str, *, head: str | None = None) -> Any:
    """The result of ``load``; its errors become one message. ``head`` is the class of the head that is loaded."""
    from safetensors import SafetensorError

    try:
        return load()
    # What the readers of safetensors and of .bin files raise for a file that was cut short.
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise FormatError(
            f"{what}: its weights are damaged ({_first_line(error)})", fix="copy or download them again"
        ) from error
    # What transformers raises for a folder that it cannot use. Its messages have many lines, and the first says most.
    # What a configuration with values of other types makes it raise has any class.
    except Exception as error:
        # The class of the error does not tell this case from others.
        if head and str(error).startswith("Unrecognized configuration class"):
            raise MismatchError(
                f"transformers has no {head} for this model",
                fix=f"choose another --task than {_task_of(head)}, or another model",
            ) from error
        # The option that transformers names for a folder whose classes are in its own files.
        if "trust_remote_code" in str(error):
            raise FormatError(
                f"{what}: its auto_map names Python code of its own, and loralens runs no code from a model",
                fix="give a model whose classes are in transformers, or in Python a loaded model=(model, tokenizer)",
            ) from error
        raise FormatError(
            f"{what}: {_first_line(error)}", fix="give the folder of a transformers model, with its tokenizer"
        ) from error


def _first_line(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def device_of(name: str) -> "Device":
    """The device of a name; ``auto`` is a GPU if there is one. Of several processes each gets its own GPU.

    Raises
    ------
    OptionError
        This machine has no such device, or torch is not installed.
    """
    torch, _ = _import_torch()
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)  # only in builds of torch that know Apple's GPUs
        name = "cuda" if torch.cuda.is_available() else "mps" if mps and mps.is_available() else "cpu"
    from loralens.training.world import local_device

    try:
        # The GPU of this process alone is tried: a process that computed on another one would take memory there.
        device: Device = local_device(torch.device(name))
        # torch accepts the name of a device that is not there, and also "meta", which holds no numbers.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        what = f"--device {name}: {_first_line(error).partition('. ')[0]}"
        raise OptionError(what, fix="give cpu, or a device of this machine") from error
    return device


def weight_options(dtype: str, device: "Device") -> dict[str, Any]:
    """The keywords of ``from_pretrained`` for weights of a dtype of `loralens.choices.BaseDtype`.

    Raises
    ------
    OptionError
        bitsandbytes is not installed, which makes codes.
    """
    import torch

    if dtype not in CODES:
        return {"dtype": getattr(torch, FLOAT_TYPES[dtype])}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise missing_packages(f"a model in {dtype}", ("bitsandbytes",), error) from error
    # What is not coded, such as embeddings and norms, and the numbers in which coded layers compute.
    from loralens.training.loop import has_bfloat16

    make: Any = BitsAndBytesConfig  # without types
    other = torch.float32 if device.type == "cpu" else torch.bfloat16 if has_bfloat16(device) else torch.float16
    if dtype == "int8":
        config = make(load_in_8bit=True)
    else:
        # As in the QLoRA paper: the scales of the blocks are coded too.
        config = make(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=other,
        )
    return {"dtype": other, "quantization_config": config, "device_map": {"": device}}


def model_name(model: ModelSource) -> str:
    """The name of the base in the adapter: the Hub id or the package, or the name of the folder.

    For a model that was given as an object it is the name of the path from which it was loaded, or its class.
    """
    if isinstance(model, tuple):
        loaded_from = model[0].config.name_or_path
        return model_name(loaded_from) if loaded_from else type(model[0]).__name__
    if not Path(model).exists():
        return str(model)
    # The path is left out: it would mean nothing on another machine, and may contain the name of the user.
    folder = Path(os.path.realpath(model))
    cache = folder.parent.parent.name  # a Hub id in the cache: models--org--name/snapshots/…
    hub = folder.parent.name == "snapshots" and cache.startswith("models--")
    return cache.removeprefix("models--").replace("--", "/", 1) if hub else folder.name


def digest_of_model(model: "nn.Module") -> str:
    """The SHA-256 of the names, dtypes, shapes and numbers of the weights of a model, in hexadecimal."""
    import torch

    digest = sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        # As bytes, since NumPy does not know bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Running(Options):
    """Computing: the model that runs, and the texts on which it runs.

    Parameters
    ----------
    model : path or (model, tokenizer)
        The base model: a transformers folder, a GGUF file, a Hub id in the local cache, or an installed package.

        Or a model of transformers and its tokenizer, which is left as it was.
    data : path or iterable
        Real inputs: a .jsonl file of {"text": …}, a .txt file of one text per line, or a .csv or .tsv file with a
        column named text.

        Or a list of texts.
    limit : int, optional
        Use only the first N texts.
    batch : int
        The number of texts that the model sees at a time.
    length : int
        The number of tokens after which a text is cut.
    device : str
        The device that runs the model: cpu, cuda, cuda:1, mps …, or auto for a GPU if there is one.
    dtype : str
        The dtype of the model's weights, in which it computes.
    threads : int, optional
        The number of CPU threads. [default: all that the process may use]
    """

    model: ModelSource
    data: TextSource
    limit: int | None = None
    # Fewer than `evaluate` takes, since hidden states are kept for a whole batch.
    batch: int = 16
    length: int = 256
    device: str = "auto"
    dtype: FloatType = "f32"
    threads: int | None = None

    def check(self) -> None:
        """Refuse counts below 1."""
        check_counts(limit=self.limit, batch=self.batch, length=self.length, threads=self.threads)
