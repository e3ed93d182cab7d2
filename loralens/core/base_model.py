"""Names and sizes of base models, and whether two of them can belong to the same model.

Names are spelled in many ways: with or without the organisation, as a path, in another case, with the additions of
quantised or converted copies. Two names count as different models only if no spelling explains the difference.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.image_models import ImageModel, likely_models
from loralens.core.matching import same_modules
from loralens.core.names import block, encoder, some

# Endings of the names of copies in another precision or format.
_COPY = re.compile(
    r"[-_. ](hf|bnb|gguf|ggml|gptq|awq|exl2|mlx|unsloth|dynamic|safetensors|ckpt|fp32|fp16|bf16|fp8|fp4|nf4|f32|f16|"
    r"int8|int4|[2-8]bit|w\d+a\d+|i?q\d\w*)$"
)
_ORGANISATION = re.compile(r"^(meta|google|facebook|openai)[-_]")  # before the name itself: meta-llama/Meta-Llama-3-8B
_HUB = re.compile(r"^[\w.-]*\w/[\w.-]+$", re.ASCII)
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)  # a folder of the Hub's cache
_TOKEN = re.compile(r"\d+(?:\.\d+)*[a-z]*|[^\W\d_]+")
_COUNT = re.compile(r"\d+(?:\.\d+)*[bm]")  # a number of parameters: 8b, 270m

# Families of models. Names of two different families belong to two models, wherever the names come from.
FAMILIES = {
    "albert", "bart", "bert", "bloom", "clip", "codegen", "cogvideo", "command", "deberta", "deepseek", "dinov",
    "distilbert", "distilgpt", "electra", "esm", "falcon", "flux", "gemma", "glm", "gpt", "gptj", "granite",
    "hubert", "internlm", "llama", "llava", "mamba", "minicpm", "minilm", "mistral", "mixtral", "mpnet", "mpt",
    "olmo", "opt", "paligemma", "pegasus", "phi", "pythia", "qwen", "roberta", "sam", "siglip", "smollm",
    "stablelm", "starcoder", "swin", "vicuna", "vit", "wan", "wav", "whisper", "xlm", "yi", "zephyr",
}  # fmt: skip
CASINGS = {"cased", "uncased"}
SIZES = {"tiny", "mini", "small", "base", "medium", "large", "xl", "xxl", "huge", "giant"}
TUNED = {"it", "instruct", "instruction", "chat"}
# `runs/bert-base` has the form of a Hub id, but its first part is not an organisation.
FOLDERS = {"model", "models", "base", "output", "outputs", "out", "run", "runs", "checkpoint", "checkpoints", "results"}
SHOWN = 4  # most groups of adapters that a message lists
# Names come from files, so their length is bounded. Of a longer path the end is kept, because it names the model.
LONGEST = 300  # letters of a name that are looked at
LEAST = 2  # shared tokens (gpt, 2) needed to tell two names apart by a size or tuning that only one of them has


@final
@dataclass(frozen=True, slots=True)
class BaseModel:
    """The name and sizes of a base model, as far as they are known.

    Attributes
    ----------
    name : str
        The name, or empty if it is unknown.
    also : tuple of str
        Other names of the model, such as the one in its configuration. They can agree with a name, but a difference
        proves nothing.
    vocabulary, hidden : int or None
        ``vocab_size`` and ``hidden_size``, if the configuration is known.
    """

    name: str
    also: tuple[str, ...] = ()
    vocabulary: int | None = None
    hidden: int | None = None

    @classmethod
    def of(cls, name: str | None, config: Mapping[str, Any] | None = None) -> "BaseModel":
        """The model with this name and, if it is known, this ``config.json``."""
        config = config or {}
        # A model of images and text has the sizes of its language model in a part of its own.
        sizes = {**config, **text_config(config)}
        vocabulary, hidden = (
            next((size for key in keys if type(size := sizes.get(key)) is int), None)
            for keys in (("vocab_size",), ("hidden_size", "n_embd", "d_model"))
        )
        config_name = config.get("_name_or_path")
        also = (config_name,) if isinstance(config_name, str) and config_name else ()
        return cls(name or "", also, vocabulary, hidden)


def text_config(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The part of a configuration about text; most configurations have no such part, and are returned whole."""
    # Models with images have a configuration for each of their parts.
    text = (config or {}).get("text_config")
    return text if isinstance(text, Mapping) else config or {}


def contradiction(first: BaseModel, second: BaseModel) -> str:
    """The reason why these are two models, in words; empty if they may be the same model.

    If their names are spellings of one name, sizes are not compared, because copies may have additional tokens.
    """
    names = [(value, other_value) for value in (first.name, *first.also) for other_value in (second.name, *second.also)]
    if any(value and other_value and _core_name(value) == _core_name(other_value) for value, other_value in names):
        return ""
    # Names come first, as their message says more than two numbers do.
    if first.name and second.name and _names_differ(first.name, second.name):
        return "their names are of two models"
    # Hidden sizes first, because a vocabulary may have been extended.
    for what, value, other_value in (
        ("hidden sizes", first.hidden, second.hidden),
        ("vocabularies", first.vocabulary, second.vocabulary),
    ):
        if value is not None and other_value is not None and value != other_value:
            return f"their {what} are {value:,} and {other_value:,}"
    return ""


def shape_contradiction(first: Adapter, second: Adapter) -> str:
    """A module whose weight has different sizes in the bases of two adapters, in words; empty if there is none.

    Only modules inside of blocks are compared, because the size of heads and embeddings depends on task and tokenizer.
    """
    for name, other in same_modules(first, second).items():
        shape, other_shape = first[name].shape, second[other].shape
        if block(name) and shape != other_shape:
            return f"{name} is {shape[0]} × {shape[1]} in one and {other_shape[0]} × {other_shape[1]} in the other"
    return ""


def image_models_of(adapter: Adapter) -> list[ImageModel]:
    """The image models that have all modules of an adapter; several if nothing in the file decides between them."""
    return likely_models({name: module.shape for name, module in adapter.items()}, stated_bases(adapter))


def stated_bases(adapter: Adapter) -> tuple[str | None, ...]:
    """What the file of an adapter says about its base model."""
    header = adapter.metadata or {}
    keys = ("ss_base_model_version", "ss_sd_model_name", "modelspec.architecture")
    return (adapter.base_model, *(header.get(key) for key in keys))


def family_contradiction(labels: Sequence[str], adapters: Sequence[Adapter]) -> str:
    """Two adapters of different image models, in words; empty if there are none.

    Image models share text encoders, so such adapters may have modules in common, with equal shapes.
    """
    known = [(label, adapter, image_models_of(adapter)) for label, adapter in zip(labels, adapters, strict=True)]
    for (label, adapter, models), (other_label, other, other_models) in combinations(known, 2):
        if models and other_models:
            differ = {model.name for model in models}.isdisjoint(model.name for model in other_models)
        else:
            differ = _is_foreign(other, adapter, models) or _is_foreign(adapter, other, other_models)
        if differ:
            first, second = (
                " or ".join(model.name for model in each) or "another model" for each in (models, other_models)
            )
            return f"{label} is an adapter of {first} and {other_label} one of {second}"
    return ""


def _is_foreign(adapter: Adapter, known: Adapter, models: Sequence[ImageModel]) -> bool:
    """Whether an adapter has no layer of the ``models`` of a ``known`` one, other than those of text encoders."""
    outside, own = ([name for name in each if not encoder(name)] for each in (adapter, known))
    # An adapter of a text encoder alone fits every model that has the encoder, known here or not.
    if not (models and outside and own):
        return False
    return not any(model.find(name, adapter[name].shape) for model in models for name in outside)


def group_models(models: Sequence[BaseModel]) -> list[list[int]]:
    """Indices of the models in groups. Models of a group do not contradict its first; unknown models are left out."""
    groups: list[list[int]] = []
    for i, model in enumerate(models):
        if not (model.name or model.hidden or model.vocabulary):
            continue
        # Compared with the first of a group only, because "may be the same" is not transitive.
        home = next((group for group in groups if not contradiction(models[group[0]], model)), None)
        if home is None:
            groups.append([i])
        else:
            home.append(i)
    return groups


def find_contradiction(labels: Sequence[str], adapters: Sequence[Adapter], models: Sequence[BaseModel]) -> str:
    """The reason why adapters belong to several base models, in words; empty if there is none.

    Parameters
    ----------
    labels : sequence of str
        Names of the adapters for the message.
    adapters : sequence of Adapter
    models : sequence of BaseModel
        The base model that each adapter names.
    """
    groups = group_models(models)
    if len(groups) > 1:
        why = contradiction(models[groups[0][0]], models[groups[1][0]])
        shown = [f"{models[group[0]].name}: {some([labels[i] for i in group])}" for group in groups]
        listed = "; ".join(shown[:SHOWN]) + (f"; and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")
        return f"these are adapters of {len(groups)} base models, as {why} ({listed})"
    # Names and configurations may say nothing, but the modules belong to a network, and have shapes.
    if family := family_contradiction(labels, adapters):
        return family
    for label, adapter in zip(labels[1:], adapters[1:], strict=True):
        why = shape_contradiction(adapters[0], adapter)
        if why:
            return f"{labels[0]} and {label} are adapters of two base models: {why}"
    return ""


def _core_name(name: str) -> str:
    """A name without its organisation, without endings of copies, and without punctuation."""
    return "".join(_tokens(name))


def _tokens(name: str) -> list[str]:
    """The words and numbers of the part of a path or Hub id that names the model, in lower case."""
    name = name[-LONGEST:]
    cached = _CACHED.search(name)
    core = (cached[2] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()
    # Copies of copies add several endings: Q4_K_M-GGUF, 4bit-MLX.
    while (shorter := _COPY.sub("", core)) != core and shorter:
        core = shorter
    return _TOKEN.findall(_ORGANISATION.sub("", core))


def _names_differ(first: str, second: str) -> bool:
    """Whether two names certainly belong to two models; they are known not to be spellings of one name."""
    tokens_first, tokens_second = set(_tokens(first)), set(_tokens(second))
    families = tokens_first & FAMILIES, tokens_second & FAMILIES
    # Both names state known families and have none in common: they are different models, also if one is a folder.
    # An XLM-RoBERTa has another vocabulary than a RoBERTa.
    if all(families) and (not families[0] & families[1] or "xlm" in families[0] ^ families[1]):
        return True
    differing = tokens_first ^ tokens_second
    if _is_hub_id(first) and _is_hub_id(second):
        # Different ids are different models, unless one is the other with a version: Mistral-7B and Mistral-7B-v0.1.
        nested = tokens_first <= tokens_second or tokens_second <= tokens_first
        return not (nested and all(word == "v" or word[-1].isdigit() for word in differing))
    # A folder may be called anything.
    if not all(families):
        return False
    counts = tuple(set(filter(_COUNT.fullmatch, tokens)) for tokens in (tokens_first, tokens_second))
    numbers_first, numbers_second = _numbers_by_word(first), _numbers_by_word(second)
    pairs = [(tokens_first & CASINGS, tokens_second & CASINGS), (tokens_first & SIZES, tokens_second & SIZES), counts]
    pairs += [(numbers_first[word], numbers_second[word]) for word in numbers_first.keys() & numbers_second.keys()]
    if any(a and b and not a & b for a, b in pairs):
        return True
    # A folder's name may leave out size and tuning, so their absence proves nothing.
    if _is_path(first) or _is_path(second):
        return False
    return bool(differing) and differing <= SIZES | TUNED and len(tokens_first & tokens_second) >= LEAST


def _numbers_by_word(name: str) -> dict[str, set[str]]:
    """Numbers by the word before them: versions of a family, numbers of layers (L6), versions of a model (v2)."""
    tokens = _tokens(name)
    numbers: dict[str, set[str]] = {}
    for word, number in pairwise(tokens):
        if number[-1].isdigit() and not word[0].isdigit():
            numbers.setdefault(word, set()).add(number)
    return numbers


def _is_path(name: str) -> bool:
    """Whether a name is the path of a folder, which may have only a part of the name of its model."""
    return not _is_hub_id(name) and bool(re.search(r"[/\\]", name))


def _is_hub_id(name: str) -> bool:
    """Whether a name is probably a Hub id (organisation and model), not a path of two folders."""
    name = name[-LONGEST:]
    # A folder of the Hub's cache has the id in its name.
    if _CACHED.search(name):
        return True
    return _HUB.match(name) is not None and name.partition("/")[0].lower() not in FOLDERS
