"""A local transformers folder, loaded to be run: its model, its tokenizer, and batches of texts."""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import click

from loralens.cli import options
from loralens.cli.terminal import say
from loralens.cli.texts import Text
from loralens.errors import FormatError, MismatchError, OptionError, place

if TYPE_CHECKING:  # keeps torch out of --help
    from torch import device as Device  # noqa: N812
    from torch import nn

    from loralens.training.tasks import Examples

Head = Literal["causal", "masked", "classifier", ""]
F = TypeVar("F", bound=Callable[..., Any])

# What an architecture's name ends in → the class that loads it, and what its logits are.
HEADS: dict[str, tuple[str, Head]] = {
    "ForCausalLM": ("AutoModelForCausalLM", "causal"),
    "LMHeadModel": ("AutoModelForCausalLM", "causal"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "masked"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "classifier"),
}

TASKS = {"AutoModelForCausalLM": "causal-lm", "AutoModelForMaskedLM": "masked-lm"}  # of a head: how --task calls it
MANY = 4096  # threads that no machine has; more than an int of C holds would end in torch

RUNNING = (
    click.option(
        "--model", required=True, metavar="DIR", help="The base model: a transformers folder, a Hub id, or a package."
    ),
    click.option(
        "--data",
        required=True,
        type=click.Path(path_type=Path),
        metavar="FILE",
        help='Real inputs: .jsonl of {"text": …}, .txt of one a line, .csv or .tsv with a column text.',
    ),
    click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N texts."),
    click.option(
        "--batch", type=click.IntRange(min=1), default=16, show_default=True, metavar="N", help="Texts at a time."
    ),
    click.option(
        "--length", type=click.IntRange(min=1), default=256, show_default=True, metavar="N", help="Tokens of a text."
    ),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="cpu, cuda, cuda:1, mps …"),
    click.option(
        "--dtype",
        type=click.Choice(list(options.DTYPES)),
        default="f32",
        show_default=True,
        help="What the model computes in.",
    ),
    click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="Of the CPU.  [default: all that it may use]"
    ),
)


def running(function: F) -> F:
    """The options of every command that runs a model on texts."""
    for option in reversed(RUNNING):
        function = option(function)
    return function


class Loaded(NamedTuple):
    """A model ready to run: what its logits are ("": it has none), and what turns texts into its inputs.

    ``made`` names the weights that its folder did not have.
    """

    model: "nn.Module"
    tokenizer: Any
    head: Head
    made: tuple[str, ...] = ()

    def batches(
        self, texts: Sequence[Text], *, batch: int, length: int, step: Callable[[int], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Inputs, ``batch`` texts at a time, cut to ``length`` tokens and padded on the right; no labels.

        ``step`` is told how many texts the model has seen.
        """
        length = self.length(length)
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            inputs = dict(
                self.tokenizer(
                    [one.text for one in part],
                    padding=len(part) > 1,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                    return_attention_mask=True,
                )
            )
            for number, tokens in enumerate(inputs["input_ids"].tolist(), start=start + 1):
                self._check(number, tokens)
            yield inputs
            if step:
                step(len(part))

    def encoded(self, texts: Sequence[str], *, length: int, labels: Sequence[int] | None = None) -> "Examples":
        """Texts as tokens that the model knows, cut to ``length`` of them, or to what it has positions for.

        Raises
        ------
        OptionError
            There is no room for a text beside what the tokenizer adds; a text has no tokens.
        MismatchError
            A token that the model has no embedding for.
        """
        from loralens.training.tasks import encoded

        found = encoded(self.tokenizer, texts, length=self.length(length), labels=labels)
        for number, tokens in enumerate(found.tokens, start=1):
            self._check(number, tokens)
        words = self.words or found.vocabulary
        if found.pad >= words:
            raise MismatchError(
                f"the tokenizer pads with token {found.pad}, and the model has {words}",
                fix="set pad_token in tokenizer_config.json to one that the model has",
            )
        mask = found.mask if found.mask is None or found.mask < words else None
        return replace(found, vocabulary=min(found.vocabulary, words), mask=mask)

    def length(self, asked: int) -> int:
        """The number of tokens that texts are cut to, where ``asked`` is wanted."""
        found = min(asked, self.longest)
        added = self.tokenizer.num_special_tokens_to_add(pair=False)
        if found <= added:
            raise OptionError(
                f"--length {found} leaves no room for a text: the tokenizer adds {added} tokens of its own",
                fix=f"give {added + 1} or more",
            )
        return found

    @property
    def longest(self) -> int:
        """Most tokens that the model has positions for.

        Where the embedding of positions has a padding index, as RoBERTa's has, positions begin behind it.
        """
        config = self.model.config
        found = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        for name, layer in self.model.named_modules():
            first = getattr(layer, "padding_idx", None)
            if "position" in name.rpartition(".")[2] and isinstance(first, int) and hasattr(layer, "num_embeddings"):
                found.append(layer.num_embeddings - first - 1)
        return int(min([n for n in found if isinstance(n, int) and n > 0] + [self.tokenizer.model_max_length]))

    @property
    def words(self) -> int | None:
        """How many tokens the model has embeddings for; None where it does not say."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None

    def random(self, brought: Collection[str]) -> set[str]:
        """The weights that were made and nobody brought; none where all of these are 0, whatever the seed."""
        parameters = self.model.state_dict(keep_vars=True)
        left = set(self.made).difference(brought)
        return left if any(key not in parameters or parameters[key].any() for key in left) else set()

    def _check(self, number: int, tokens: Sequence[int]) -> None:
        """Refuse a token that the model has no embedding for."""
        words = self.words
        if words is not None and max(tokens, default=0) >= words:
            token = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise MismatchError(
                f"text {number} holds {token!r}, token {max(tokens)} of the tokenizer, and the model has {words}",
                fix="give the model the tokenizer that it was trained with",
            )


def load_model(path: str, *, device: str, dtype: str, threads: int | None) -> Loaded:
    """The model in a local transformers folder, with the head that its configuration names; nothing is downloaded.

    Weights that the folder lacks are made at random from a fixed seed, and said on stderr.

    Raises
    ------
    OptionError
        torch or transformers is missing, the device is none, nothing is at ``path``.
    FormatError
        No model or no tokenizer can be loaded from there.
    MismatchError
        It is an encoder with a decoder.
    """
    loaded = load_headed(path, None, device=device, dtype=dtype, threads=threads)
    if loaded.made:
        say(f"warning: {path}: {len(loaded.made)} weights are missing and random here: {loaded.made[0]} …", err=True)
        click.echo("  fix: trust no number that depends on them, or give a folder that has them", err=True)
    return loaded


def load_headed(
    path: str,
    head: str | None,
    *,
    device: str,
    dtype: str,
    threads: int | None,
    seed: int = 0,
    labels: Sequence[str] | None = None,
) -> Loaded:
    """The same with a head of choice: a class of `HEADS`, for classifiers with the names of the labels.

    Weights that the folder lacks, or has for other labels, are made at random from ``seed``, and are named by ``made``.
    """
    from loralens.formats.files.container import CONFIG
    from loralens.formats.files.location import existing

    folder = existing(Path(path))
    torch, transformers = _imported()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if threads and threads > MANY:
        raise OptionError(
            f"--threads {threads} is more than {MANY}", fix="give as many as the machine has, or leave it out"
        )
    torch.set_num_threads(threads or _processors())
    with place(path), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        found, kind = _class(transformers, folder)
        if (folder / CONFIG).exists():  # transformers would switch the adapter on
            raise FormatError(
                f"holds an adapter beside the model ({CONFIG})", fix="move the adapter into a folder of its own"
            )
        target = device_of(device)
        tokenizer = _tokenizer(transformers, folder)
        more: dict[str, Any] = {}
        if labels is not None:
            numbered = dict(enumerate(labels))
            more = {"num_labels": len(labels), "id2label": numbered, "ignore_mismatched_sizes": True}
            more["label2id"] = {name: number for number, name in numbered.items()}
        model, info = _loading(
            lambda: _known(
                lambda: getattr(transformers, head or found).from_pretrained(
                    folder,
                    local_files_only=True,
                    dtype=getattr(torch, options.DTYPES[dtype]),
                    output_loading_info=True,
                    **more,
                ),
                head,
            ),
            "its model cannot be loaded",
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # classifiers look for the last token that is none
    model.config.use_cache = False
    made = {*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])}
    return Loaded(model.to(target).eval(), tokenizer, dict(HEADS.values())[head] if head else kind, tuple(sorted(made)))


def labels_of(path: str) -> tuple[str, ...]:
    """The labels of the classifier in a folder, in its order; none where it holds no classifier."""
    from loralens.formats.files.location import existing

    folder = existing(Path(path))
    _, transformers = _imported()
    with place(path):
        if _class(transformers, folder)[1] != "classifier":
            return ()
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return tuple(str(config.id2label[number]) for number in sorted(config.id2label))


def _imported() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise OptionError(
            f"running a model needs torch and transformers ({error})", fix="pip install 'loralens[train]'"
        ) from error
    return torch, transformers


def _processors() -> int:
    """How many processors this process may use; our own entry point has told OpenMP to use one.

    Where torchrun started several processes on this machine, each takes its part.
    """
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, found // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _class(transformers: Any, folder: Path) -> tuple[str, Head]:
    config = _loading(
        lambda: transformers.AutoConfig.from_pretrained(folder, local_files_only=True), "holds no transformers model"
    )
    if getattr(config, "is_encoder_decoder", False):
        raise MismatchError(
            f"{config.model_type} is an encoder with a decoder, and only one stack can be run", fix="give another model"
        )
    for architecture in config.architectures or ():
        for ending, found in HEADS.items():
            if architecture.endswith(ending):
                return found
    return "AutoModel", ""


def _tokenizer(transformers: Any, folder: Path) -> Any:
    tokenizer = _loading(
        lambda: transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True), "no tokenizer can be loaded"
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one where there is no file
        raise FormatError("its tokenizer knows no words", fix="copy the tokenizer's files into the folder of the model")
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise FormatError("its tokenizer pads with nothing", fix="set pad_token in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token  # where the attention mask says 0, so it does not matter which
    return tokenizer


def _loading(load: Callable[[], Any], what: str) -> Any:
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        return load()
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise FormatError(
            f"{what}: its weights are damaged ({_first(error)})", fix="copy or download them again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise FormatError(
            f"{what}: {_first(error)}", fix="give the folder of a transformers model, with its tokenizer"
        ) from error


def _first(error: Exception) -> str:
    """The first line of a message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _known(load: Callable[[], Any], head: str | None) -> Any:
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
    torch, _ = _imported()
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
