"""The table of rules that tell what a program would reject, or silently ignore, in an adapter, each with a fix.

Every rule was read from the code of the programs: `CLIENTS` has the versions, and `RULES` the files.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import isclose, sqrt
from typing import Any, Literal, final

from loralens.choices import Consumer, Level
from loralens.core import image_names
from loralens.core.adapter import Adapter, Finding
from loralens.core.base_model import image_models_of
from loralens.core.image_families import Client as MapClient
from loralens.core.image_families import Leaf, names_mapped
from loralens.core.image_models import is_text_encoder
from loralens.core.matching import Match, Shape
from loralens.core.names import WRAPPERS, is_convolution_name, is_expert_alone, kind, some
from loralens.core.structured import Structured, Update
from loralens.core.together import MAGNITUDES, TASK_HEADS

Fields = Mapping[str, Any]  # the fields of adapter_config.json


@final
@dataclass(frozen=True, slots=True)
class Client:
    """A program that loads adapters.

    Attributes
    ----------
    title : str
        Its name in messages.
    version : str
        The versions whose code the rules were read from.
    reads : tuple of str
        The dialects that it takes.
    scale : callable, optional
        The scale that it applies, from the configuration of PEFT and a module; without one it takes every scale.
    target : str
        The dialect that ``convert --to`` writes for it; empty if the program has a dialect of its own name.
    most_rank : int or None
        The largest rank that it can be told to take.
    """

    title: str
    version: str
    reads: tuple[str, ...]
    scale: Callable[[Fields, Update], float] | None = None
    target: str = ""
    most_rank: int | None = None


def _declared_scale(config: Fields, _: Update) -> float:
    """α/r, or α/√r, with the r of the configuration: patterns are ignored."""
    return float(config["lora_alpha"]) / (sqrt(config["r"]) if config.get("use_rslora") else config["r"])


def _plain_scale(config: Fields, _: Update) -> float:
    """α/r with the r of the configuration."""
    return float(config["lora_alpha"]) / float(config["r"])


def _own_scale(config: Fields, module: Update) -> float:
    """α/r with the rank of the tensors."""
    return float(config["lora_alpha"]) / module.rank


def _own_rslora_scale(config: Fields, module: Update) -> float:
    """α/r, or α/√r, with the rank of the tensors."""
    return float(config["lora_alpha"]) / (sqrt(module.rank) if config.get("use_rslora") else module.rank)


CLIENTS: Mapping[Consumer, Client] = {
    "vllm": Client("vLLM", "0.32.0 and 0.33.0", ("peft",), target="peft", most_rank=512),
    "sglang": Client("SGLang", "0.5.23", ("peft",), _plain_scale, "peft"),
    "llama.cpp": Client("llama.cpp", "0650ea8c", ("gguf",), target="gguf"),
    "ollama": Client("Ollama", "fb307609, before 0.34.1", ("peft", "gguf"), _own_scale, "gguf"),
    "tensorrt-llm": Client("TensorRT-LLM", "007e181b (1.0)", ("peft",), _own_rslora_scale, "peft", 64),
    "lorax": Client("LoRAX", "0.12.1, main of 2026-05", ("peft",), _declared_scale, "peft", 128),
    "mlx": Client("mlx-lm", "0.32.0", ("mlx",)),
    "comfyui": Client("ComfyUI", "0.33.0; rules also of 0.38.1", ("comfyui", "kohya", "lycoris")),
    "sd-scripts": Client("sd-scripts", "0.10.1", ("kohya",), target="kohya"),
    "diffusers": Client("diffusers", "0.42.1", ("diffusers", "kohya", "comfyui", "xlabs")),
    "peft": Client("PEFT", "0.21.2", ("peft",)),
}


@final
@dataclass(frozen=True, slots=True)
class Case:
    """An adapter, the program that shall load it, and what is known of the base and of the files beside it.

    Attributes
    ----------
    match : Match or None
        How the names match the base.
    base : mapping of str to tuple of int
        The shapes of the tensors of the base; empty if no base was given.
    architecture : str or None
        The ``model_type`` of the base.
    added_tokens : sequence of int
        The numbers of the tokens in ``added_tokens.json`` beside the adapter.
    """

    adapter: Adapter
    consumer: Consumer
    match: Match | None = None
    base: Mapping[str, Shape] = field(default_factory=dict)
    architecture: str | None = None
    added_tokens: Sequence[int] = ()

    @property
    def client(self) -> Client:
        """The program."""
        return CLIENTS[self.consumer]

    @property
    def config(self) -> Fields:
        """The configuration of PEFT beside the file; empty if it has none or is of another dialect."""
        return (self.adapter.config or {}) if self.adapter.format == "peft" else {}


Find = Callable[[Case], Iterable[Finding]]


@final
@dataclass(frozen=True, slots=True)
class Rule:
    """A rule of one or several programs: what it finds, and the file of each program in which that was read."""

    find: Find
    source: Mapping[Consumer, str]


# ComfyUI skips an unknown name and writes a line to its log. The ``load_state_dict`` of sd-scripts is not strict, so
# unknown names are skipped too.
READ = ("comfyui", "kohya", "lycoris", "diffusers", "peft", "xlabs")  # dialects of which ComfyUI knows some names
OWN = ("comfyui", "kohya", "lycoris")  # dialects that it reads completely
ALGORITHMS = (  # endings of keys from which comfy/weight_adapter builds updates that are not pairs here
    ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".oft_blocks", ".rescale",
)  # fmt: skip
WITH_PIPELINE = "(and --base PIPELINE, the folder of the whole pipeline, for models other than SD, SDXL and FLUX.1)"
TO_COMFYUI = f"loralens convert … --to comfyui {WITH_PIPELINE}"
TO_DIFFUSERS = "loralens convert … --to diffusers"
TOGETHER: Mapping[Leaf, Leaf] = {"lora_A": "lora_A together", "lora_down": "lora_down together"}
NAME_BASE = "name the base in its metadata (modelspec.architecture, base_model_name_or_path)"
TO_KOHYA = f"loralens convert … --to kohya {WITH_PIPELINE}"
RENAME_KOHYA = "loralens convert … --to kohya"


error = partial(Finding, "error")  # about what makes a consumer refuse an adapter, or apply a different update
warning = partial(Finding, "warning")  # about what a consumer ignores, or handles differently in some versions


def _about(code: str, choose: Callable[[Case], Sequence[str]], text: str, fix: str, level: Level = "error") -> Find:
    """The rule that nothing may be chosen.

    Its text has the ``{count}`` of the names that are, the ``{first}``, and the ``{title}`` of the program.
    """

    def rule(case: Case) -> Iterator[Finding]:
        if names := choose(case):
            said = text.format(count=len(names), first=some(names, 1), title=case.client.title)
            yield Finding(level, code, said, fix)

    return rule


def _extra_keys(adapter: Adapter, *roles: str) -> list[str]:
    """The keys of the tensors with these roles."""
    return [key for key, extra in adapter.extra.items() if extra.role in roles]


def _read_as_error(*codes: str) -> Find:
    """The rule that findings of the reader with these codes are errors."""
    return lambda case: (replace(one, level="error") for one in case.adapter.findings if one.code in codes)


def _comfyui_names(case: Case) -> Iterator[Finding]:
    """``model_lora_keys_unet`` and ``model_lora_keys_clip`` of comfy/lora.py, ``convert_lora`` of lora_convert.py."""
    adapter = case.adapter
    stored, files = stored_keys(adapter), _comfyui_files(adapter)
    unknown = {name: file for name, (file, known) in files.items() if not known}
    # If ComfyUI knows no name at all, the dialect is the reason, and a list of names would not help.
    if adapter.format == "xlabs" and unknown:
        yield error("dialect", "ComfyUI reads XLabs' names only where all blocks of FLUX are there", TO_COMFYUI)
    elif adapter.format not in READ or (unknown and len(unknown) == len(stored) and adapter.format not in OWN):
        yield error("dialect", f"is {adapter.format}, and ComfyUI reads {', '.join(OWN)}", TO_COMFYUI)
    else:
        musubi = any(map(image_names.MUSUBI_HUNYUAN.match, unknown.values()))
        fix = (
            "convert_lora.py of musubi-tuner, with the target 'other', gives it names of ComfyUI"
            if musubi
            else TO_COMFYUI
        )
        yield from _report_unknown(unknown, len(stored), "ComfyUI", fix)
        # Its maps of diffusers' transformers: SD3, FLUX, AuraFlow, PixArt, HunyuanVideo, HiDream, Qwen-Image.
        unsure = [file for file, known in files.values() if known and image_names.comfyui_may_lack(file)]
        if unsure and not _family(adapter):
            text = f"{len(unsure)} modules have names that no map of ComfyUI has: {some(unsure, 1)}"
            yield warning("names-unmapped", text, "load it in ComfyUI, and look for 'lora key not loaded' in its log")


def _comfyui_files(adapter: Adapter) -> dict[str, tuple[str, bool]]:
    """The name of each module in the file, and whether ComfyUI can know that name."""
    stored = stored_keys(adapter)
    # ComfyUI renames XLabs' names only in a complete file, by its ``convert_uso_lora``.
    if adapter.format == "xlabs":
        is_uso = image_names.is_uso(key for keys in stored.values() for key in keys)
        return {name: (keys[0], is_uso) for name, keys in stored.items()}
    files = {name: image_names.file_name(keys) for name, keys in stored.items()}
    mapped = _mapped(adapter, "comfyui", [file for file in files.values() if file])
    return {
        name: (stored[name][0], False) if file is None else (file, mapped.get(file, image_names.comfyui_has(file)))
        for name, file in files.items()
    }


def _family(adapter: Adapter) -> str:
    """The family of `loralens.core.image_families` of whose models all modules are layers; empty if there is none."""
    models = image_models_of(adapter)
    return models[0].family if models else ""


def _mapped(adapter: Adapter, client: MapClient, names: Iterable[str], leaf: Leaf = "lora_A") -> dict[str, bool]:
    """Whether a client maps the names of a file, as far as the table of families tells."""
    family = _family(adapter)
    return names_mapped(client, family, [n for n in names if not is_text_encoder(n)], leaf) if family else {}


def _other_families(case: Case) -> Iterator[Finding]:
    """Modules that another model has, too, of which the program does not load these names."""
    models, client = image_models_of(case.adapter), case.client
    files = [name for name in _files(case.adapter).values() if not is_text_encoder(name)]
    mapper: MapClient = "diffusers" if case.consumer == "diffusers" else "comfyui"
    for other in (one for one in models[1:] if one.family):
        mapped = names_mapped(mapper, other.family, files, _half(case.adapter))
        if lost := [name for name, known in mapped.items() if not known]:
            text = f"nothing says whether it is of {models[0].name} or of {other.name}, of whose names {client.title} "
            yield warning("family-unclear", f"{text}ignores {some(sorted(lost), 1)}", NAME_BASE)


def _diffusers_names(case: Case) -> Iterator[Finding]:
    """``lora_state_dict`` of the pipelines, with the converters of lora_conversion_utils.py."""
    adapter = case.adapter
    files, half = _files(adapter), _half(adapter)
    if adapter.format not in case.client.reads or not files:
        return
    mapped = _mapped(adapter, "diffusers", files.values(), half)
    together = _mapped(adapter, "diffusers", files.values(), TOGETHER[half])
    if adapter.format == "kohya" and not mapped:
        models = image_models_of(adapter)
        mapped = {file: image_names.diffusers_has(file) for file in files.values()}
        if models:
            # A converter of diffusers renames the layers of SDXL and FLUX.1 from either name.
            layers = {name: models[0].find(name, adapter[name].shape)[0] for name in files}
            mapped = {
                file: file in (models[0].kohya(layers[name]), *image_names.flat_names(layers[name].name))
                for name, file in files.items()
            }
    unknown = {name: file for name, file in files.items() if not mapped.get(file, True)}
    partial = [file for file in unknown.values() if together.get(file)]
    if partial:
        text = f"diffusers loads {len(partial)} modules only with all layers of their blocks: {some(partial, 1)}"
        yield warning("names-unmapped", text, TO_DIFFUSERS)
    yield from _report_unknown(
        {name: file for name, file in unknown.items() if file not in partial}, len(files), "diffusers", TO_DIFFUSERS
    )


def stored_keys(adapter: Adapter) -> dict[str, list[str]]:
    """The keys of each module in its file, for modules that were read from a file."""
    return {name: list(module.origin.tensors) for name, module in adapter.items() if module.origin}


def _files(adapter: Adapter) -> dict[str, str]:
    """The name of each module in the file that it was read from."""
    return {name: image_names.file_name(keys) or keys[0] for name, keys in stored_keys(adapter).items()}


def _half(adapter: Adapter) -> Leaf:
    """What the first factor is called in the file."""
    keys = (key for keys in stored_keys(adapter).values() for key in keys)
    return "lora_down" if any("lora_down" in key for key in keys) else "lora_A"


def _report_unknown(unknown: dict[str, str], count: int, consumer: str, fix: str) -> Iterator[Finding]:
    if unknown:
        text = f"{consumer} ignores {len(unknown)} of {count} modules, whose names it does not have"
        yield error("names", f"{text}: {some(unknown.values(), 1)}", fix)


def _comfyui_scale(case: Case) -> Iterator[Finding]:
    """``load_lora``: the scale is α/rank with the ``.alpha`` beside a pair, and 1 without; nothing else is read."""
    adapter = case.adapter
    # In these dialects the scale may stand in a header or a configuration.
    if adapter.format not in ("diffusers", "peft"):
        return
    stored = stored_keys(adapter)
    unsaid = [
        name
        for name, (_, known) in _comfyui_files(adapter).items()
        if known and adapter[name].scale != 1 and not any(key.endswith(".alpha") for key in stored[name])
    ]
    if unsaid:
        text = f"the scale of {some(unsaid, 1)} stands outside the weights, where ComfyUI does not look: it takes 1"
        yield error("scale", text, TO_COMFYUI)


def _comfyui_dora(case: Case) -> Iterator[Finding]:
    """``weight_decompose`` of weight_adapter/base.py, for a ``dora_scale``; no other name of a magnitude is read."""
    adapter = case.adapter
    magnitudes = {key: extra for key, extra in adapter.extra.items() if extra.role.startswith("magnitude")}
    unread = [key for key in magnitudes if not key.endswith(".dora_scale")]
    if unread:
        yield error("dora", f"DoRA magnitudes are ignored: {some(unread, 1)}", "merge it into the base")
    # ComfyUI and LyCORIS agree on magnitudes by input, so "magnitude_in" needs no warning.
    if any(extra.role == "magnitude" for key, extra in magnitudes.items() if key not in unread):
        text = "ComfyUI divides by ‖W‖, not ‖W+ΔW‖, on the output axis: DoRA has another effect than in training"
        yield warning("dora", text, "merge it into the base")


def _ignored_by_comfyui(case: Case) -> list[str]:
    """``load_lora``: ``diff``, ``diff_b``, ``set_weight``, ``w_norm``, ``b_norm``, ``reshape_weight``."""
    # "saved" is set_weight; a head that another dialect trained in full is ignored.
    adapter = case.adapter
    applied = {"magnitude", "magnitude_in", "diff", "diff_b", "shape", *(["saved"] * (adapter.format == "comfyui"))}
    return [key for key, extra in adapter.extra.items() if extra.role not in applied and not key.endswith(ALGORITHMS)]


def _kohya(case: Case) -> Iterator[Finding]:
    """``LoRANetwork.create_modules`` and ``create_network_from_weights`` of networks/lora.py."""
    adapter = case.adapter
    if adapter.format != "kohya":
        fix = "train and load it with network_module lycoris.kohya" if adapter.format == "lycoris" else TO_KOHYA
        yield error("dialect", f"is {adapter.format}, and networks.lora reads kohya", fix)
        return
    files = _files(adapter)
    unknown = {name: file for name, file in files.items() if not image_names.sd_scripts_has(file)}
    # A known model has one name for each layer.
    model = next(iter(image_models_of(adapter)), None)
    if model is not None:
        right = {name: model.kohya(model.find(name, adapter[name].shape)[0]) for name in files}
        unknown |= {name: file for name, file in files.items() if file != right[name]}
    yield from _report_unknown(unknown, len(files), "sd-scripts", TO_KOHYA if model is None else RENAME_KOHYA)
    # It has no DoRA: ``dora_scale`` is one of the keys that ``load_state_dict`` passes over.
    magnitudes = _extra_keys(adapter, "magnitude", "magnitude_in")
    if magnitudes:
        fix = "load it with network_module lycoris.kohya, or merge it into the base"
        yield error("dora", "networks.lora has no DoRA: magnitudes are ignored", fix)
    if unread := [key for key in adapter.extra if key not in magnitudes]:
        text = f"{len(unread)} tensors that do not belong to a pair are ignored: {some(unread, 1)}"
        yield error("extra-ignored", text, "merge them into the base")


# Codes of the reader of PEFT's dialect about what PEFT raises an error for (the first), or passes over.
READ_AS_ERRORS = ("rank-disagrees", "module-untargeted", "module-excluded", "prefix-missing", "switched-off")
# Classes of transformers with a head that pretraining does not train, and what their models call these heads.
CLASSES = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)(WithTeacher)?$")
CALLED = frozenset({
    "classifier", "score", "qa_outputs", "classification_head", "sequence_summary", "logits_proj", "head", "cls",
    "cls_classifier", "distillation_classifier",
})  # fmt: skip
PREFIX = "base_model.model."  # of all names that PEFT looks up
HEADS = frozenset(name for names in TASK_HEADS.values() for name in names)
BEFORE_HEAD = "pre_classifier"
WRITES_PREFIX = "loralens convert … --to peft writes the prefix"
FROM_TRAINING = "take the head from a checkpoint of the training; without one, train again with it in modules_to_save"


def lost_heads(adapter: Adapter) -> Iterator[Finding]:
    """``set_peft_model_state_dict`` looks up every module that is saved in full: a KeyError if it is not in the file.

    A module is one if its path ends in a name of ``modules_to_save``, to which the model of a task adds its heads.
    """
    config = adapter.config or {}
    if adapter.format != "peft":
        return
    task, named = config.get("task_type"), config.get("modules_to_save")
    # A hostile configuration may have anything in these fields.
    heads = TASK_HEADS.get(task, ()) if isinstance(task, str) else ()
    saved = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    asked = list(dict.fromkeys([*saved, *heads]))
    lost = [name for name in asked if not _holds(adapter, name)]
    # The model of a task asks for two names, of which a base has one, or none if its head has another name.
    if len(lost) < len(asked):
        lost = [name for name in lost if name not in HEADS]
    # One of several tied modules is enough then.
    if lost and not config.get("ensure_weight_tying"):
        task = f" and task_type {task}" if heads else ""
        bare = any(_holds(adapter, name, prefix="") for name in lost)
        how, fix = (f"has without {PREFIX}", WRITES_PREFIX) if bare else ("lacks", FROM_TRAINING)
        text = f"modules_to_save{task} ask for {some(lost)}, which the file {how}: PEFT raises a KeyError then"
        yield error("head-missing", text, fix)
    mapping = config.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    # What was trained in full may be a head of any name; biases are not.
    trained = any(extra.role == "saved" for extra in adapter.extra.values()) or has_head([*adapter, *adapter.extra])
    if isinstance(name, str) and CLASSES.search(name) and not heads and not trained:
        text = f"it was trained on {name!a:.60}, and the file holds no head: PEFT takes that of the base, if it has one"
        yield warning("head-missing", text, FROM_TRAINING)


def has_head(names: Iterable[str]) -> bool:
    """Whether one of the names is inside of a head, by what models of transformers call theirs."""
    return any(not CALLED.isdisjoint(name.split(".")) for name in names)


def _holds(adapter: Adapter, name: str, prefix: str = PREFIX) -> bool:
    """Whether the file holds a tensor of a module whose path ends in ``name``, or of a part of such a module."""
    paths = [key.removeprefix(PREFIX).rpartition(".")[0] for key in adapter.extra if key.startswith(prefix)]
    # Old versions of PEFT stored ….modules_to_save.weight, which 0.21.2 does not look up.
    paths = [path for path in paths if not path.endswith(".modules_to_save")]
    # PEFT takes the layer before the head of DistilBERT for a classifier, too. The classifier itself is needed as well.
    if name != BEFORE_HEAD:
        paths = [path for path in paths if path.rpartition(".")[2] != BEFORE_HEAD]
    return any(path.endswith(name) or f"{name}." in path for path in paths)


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank
VLLM_RANK = 16  # the default of --max-lora-rank
VLLM_PATTERNS = "0.32.0"  # the first version that reads rank_pattern and alpha_pattern
# Initialisations that do not change the base. Others, such as PiSSA, take a part of W into the factors.
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VLLM_UNREAD = {  # fields of a configuration that vLLM refuses
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "lora_bias": "lora_bias",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
VLLM_HEADS = ("score", "classifier")  # the only modules that may be trained in full
VLLM_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
LORAX_STEP = 16  # SGMV_BLOCK_SIZE, to a multiple of which larger ranks are padded; ranks up to 8 are padded to 8
PLAIN = "LORA"  # the peft_type of plain pairs
SAME = 1e-9  # relative difference up to which two scales are equal: α/r is a quotient that was rounded to float64
TRAINED_IN_FULL = ("saved", "copy", "embedding", "tokens")  # roles of tensors that replace a part of the base
BIASES = ("bias", "lora_bias")
PARALLEL = "module."  # what DistributedDataParallel puts before all names
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BEHIND_NUMBER = re.compile(rf"\.\d+\.\S*({'|'.join(WRAPPERS)})\.")
TRT_NAME = re.compile(rf".*\.\d+\.\w+\.(\w+\.\d+\.)?({'|'.join(LLAMA)}|gate_up_proj|w[123]|gate)$")
OLLAMA_FAMILIES = ("llama", "mistral", "gemma2")  # as transformers call them; GGUF counts Mistral among Llama
OTHER_FAMILIES = re.compile(r"qwen|phi-?\d|gemma-?3|gemma-(2b|7b)\b|deepseek|granite|falcon|bloom|gpt", re.IGNORECASE)
MERGE_GGUF = "merge it into the GGUF file of the model, which every version takes"


def check(
    adapter: Adapter,
    consumer: Consumer,
    match: Match | None = None,
    base: Mapping[str, Shape] | None = None,
    *,
    architecture: str | None = None,
    added_tokens: Sequence[int] = (),
) -> list[Finding]:
    """Find what ``consumer`` would reject, ignore or apply differently (errors); errors come before warnings.

    Parameters
    ----------
    adapter : Adapter
    consumer : str
        One of `CLIENTS`.
    match, base, architecture, added_tokens
        See `Case`.
    """
    case = Case(adapter, consumer, match, base or {}, architecture, added_tokens)
    findings = [finding for rule in RULES if consumer in rule.source for finding in rule.find(case)]
    # Sorting is stable: among errors, and among warnings, the order of the rules stays.
    return sorted(findings, key=lambda finding: finding.level != "error")


NO_PROGRAM = Finding(
    "warning",
    "names",
    "its names are of the program that trained it: no client known here has them",
    "use it with the program that trained it",
)


def applied_by(adapter: Adapter) -> tuple[list[Consumer], Finding | None]:
    """The programs that apply an adapter as it was trained, or why those that read its dialect do not."""
    errors = {
        consumer: [finding for finding in check(adapter, consumer) if finding.level == "error"] for consumer in CLIENTS
    }
    clients = [consumer for consumer, found in errors.items() if not found]
    # That a program reads another dialect is no fault of a file. Plain names are of no program.
    reasons = [found[0] for found in errors.values() if found and all(each.code != "dialect" for each in found)]
    reasons += [NO_PROGRAM] if adapter.format == "plain" else []
    return clients, None if clients or not reasons else reasons[0]


def _for(consumer: str, then: str = "") -> str:
    """The command that writes what a program takes."""
    return f"loralens convert … --to {consumer}{then}"


def _dialect(case: Case) -> Iterator[Finding]:
    """Only these dialects are read."""
    reads = case.client.reads
    if case.adapter.format not in reads:
        to = case.consumer if case.client.target else reads[0]
        to = "kohya" if to == "sd-scripts" else "gguf" if to == "llama.cpp" else to
        text = f"is {case.adapter.format}, and {case.client.title} reads {' or '.join(reads)}"
        yield error("dialect", text, _for(to))


def _configured(case: Case) -> Iterator[Finding]:
    # An adapter in memory has no file, and gets its configuration when it is written.
    if case.adapter.format in ("peft", "mlx") and case.adapter.config is None and stored_keys(case.adapter):
        form = case.adapter.format
        fix = f"put the configuration of the training beside it; {_for(form, ' --alpha A')} writes one"
        yield error("config", "there is no adapter_config.json, and the file is refused without one", fix)


def _typed(case: Case) -> Iterator[Finding]:
    # An adapter in memory gets the field when it is written.
    if case.config and case.config.get("peft_type") is None and stored_keys(case.adapter):
        text = f"adapter_config.json has no peft_type, and {case.client.title} raises a KeyError then"
        yield error("config", text, _for("peft", " writes it"))


def _fields(*needed: str) -> Find:
    """The rule that these fields of the configuration are there."""

    def rule(case: Case) -> Iterator[Finding]:
        if not case.config or _peft_type(case.adapter) != PLAIN:
            return
        if missing := [name for name in needed if case.config.get(name) is None]:
            text = f"adapter_config.json has no {', '.join(missing)}, and {case.client.title} refuses it then"
            yield error("config", text, f"put the fields there: {_for('peft', ' writes them')}")

    return rule


# No consumer of pairs can apply a LoKr, LoHa or full update.
NO_STRUCTURE = _about(
    "structured",
    lambda case: [name for name, module in case.adapter.items() if isinstance(module, Structured)],
    "{count} modules are not pairs B·A",
    "loralens convert … --rank R makes them pairs",
)


def _only_lora(case: Case) -> Iterator[Finding]:
    """Of the types of adapter that PEFT writes, the servers read only plain LoRA.

    Most do not read peft_type. They refuse the tensors of AdaLoRA, LoHa and LoKr, or find none of them.
    """
    kind = _peft_type(case.adapter)
    if kind == PLAIN:
        yield from NO_STRUCTURE(case)
        return
    # A LoKr or LoHa becomes pairs only at a rank, which the user has to choose; an AdaLoRA has pairs already.
    rank = " --rank R" if any(isinstance(module, Structured) for module in case.adapter.modules.values()) else ""
    text = f"peft_type is {kind}, whose tensors are refused or not found: this reads {PLAIN} alone"
    yield error("peft-type", text, _for("peft", f"{rank} makes it one"))


def _peft_structure(case: Case) -> Iterator[Finding]:
    """PEFT reads its own LoHa and LoKr files, as it reads all its own types; it reads no other structure."""
    if _peft_type(case.adapter) == PLAIN:
        yield from NO_STRUCTURE(case)


def _peft_kernels(case: Case) -> Iterator[Finding]:
    """The A of a convolution has its kernel."""
    adapter, match = case.adapter, case.match
    if adapter.format != "peft" or _peft_type(adapter) != PLAIN:
        return
    keys = match.keys if match else {}

    def is_wrong(name: str) -> bool:
        kind, kernel = adapter[name].layout.kind, adapter[name].layout.kernel
        if kind not in ("linear", "conv") or (match and name in match.places):
            return False
        return kernel != case.base[keys[name]][2:] if name in keys else kind == "linear" and is_convolution_name(name)

    wrong = [name for name in adapter if is_wrong(name)]
    if wrong:
        why = "is not that of its weight" if keys else "is missing, and its name is that of a convolution"
        text = f"the kernel in the factors of {some(wrong, 1)} {why}: PEFT does not load them"
        yield error("kernel", text, "convert the file that it was made from again, with --base")


def _peft_type(adapter: Adapter) -> str:
    declared = (adapter.config or {}).get("peft_type") if adapter.format == "peft" else None
    return str(declared or PLAIN)


def _wrapped(case: Case) -> Iterator[Finding]:
    """Modules are looked up by their stored names, so those with the name of a wrapper are not found."""
    what = f"{case.client.title} looks the stored names up, and does not apply these: "
    behind_number = case.consumer == "tensorrt-llm"  # it begins to read there
    for finding in case.adapter.findings:
        if finding.code == "trainer-names" and (not behind_number or BEHIND_NUMBER.search(finding.text)):
            to = case.consumer if case.client.target else case.adapter.format
            yield error("names-unmapped", what + finding.text, _for(to, " writes the names of the model"))
    # Image models have rules of their own for all names.
    parallel = [name for name in case.adapter if name.startswith(PARALLEL)]
    if parallel and not behind_number and case.adapter.format in ("peft", "mlx"):
        fix = "loralens convert … --prefix module.= writes the names of the model"
        yield error("names-unmapped", what + some(parallel, 1), fix)


def _other_names(case: Case) -> Iterator[Finding]:
    """Names that match the base only after an edit, where modules are looked up as they are."""
    if not case.match or not case.match.edit:
        return
    title, match = case.client.title, case.match
    text = f"{title} looks the names up as they are, and they match the base only after {match.edit}: "
    # What the modules of a base are called that is stored under other names, its files do not say.
    if match.by_storage:
        yield warning("names-differ", text + "it may do nothing", "test the outputs against those of the base")
    else:
        yield error(
            "names-differ", text + "it does nothing", "loralens convert … --base DIR writes it under the base's names"
        )


def _wrong_scale(case: Case) -> Iterator[Finding]:
    """Every module has the scale that the program applies; patterns with the same α/r are harmless."""
    if case.client.scale:
        yield from _scale_by(case, case.client.scale, "error", case.client.title)


def _old_scale(case: Case) -> Iterator[Finding]:
    title = f"vLLM before {VLLM_PATTERNS}"
    yield from _scale_by(case, _declared_scale, "warning", title)


def _scale_by(case: Case, scale: Callable[[Fields, Update], float], level: Level, title: str) -> Iterator[Finding]:
    config = case.config
    r, alpha = config.get("r"), config.get("lora_alpha")
    # Without r and α the configuration states no scale; that they are missing is a finding of another rule.
    if type(r) is not int or r <= 0 or not isinstance(alpha, int | float) or _peft_type(case.adapter) != PLAIN:
        return
    wrong = [
        name for name, module in case.adapter.items() if not isclose(module.scale, scale(config, module), rel_tol=SAME)
    ]
    if wrong:
        fields = [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if config.get(name)]
        what = " and ".join(fields) or "how this file states α"
        first = case.adapter[wrong[0]]
        text = (
            f"{title} ignores {what}: {len(wrong)} modules get the wrong strength, {scale(config, first):.4g} in place "
            f"of {first.scale:.4g} for {wrong[0]}"
        )
        yield Finding(level, fields[0].replace("_", "-") if fields else "scale", text, _for(case.consumer))


def _vllm_saved(outcome: Literal["loaded", "skipped", "refused"]) -> Callable[[Case], list[str]]:
    """The keys of tensors beside the pairs that vLLM loads as a head, skips as an embedding, or refuses."""

    def outcome_of(key: str, config: Fields) -> str:
        owner = key.split(".")[-2:-1]
        if owner and owner[0] in VLLM_HEADS and owner[0] in (config.get("modules_to_save") or ()):
            return "loaded"
        return "skipped" if key.endswith(VLLM_SKIPPED) else "refused"

    def choose(case: Case) -> list[str]:
        keys = [key for key, one in case.adapter.extra.items() if one.role not in (*MAGNITUDES, *BIASES)]
        return [key for key in keys if outcome_of(key, case.config) == outcome]

    return choose


def _vllm_unsaved(case: Case) -> list[str]:
    """The names of modules_to_save that vLLM refuses even if the file has no tensors of them."""
    named = case.config.get("modules_to_save")
    saved = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    keys = _vllm_saved("refused")(case)
    return [name for name in saved if name not in VLLM_HEADS and not any(f".{name}." in f".{key}" for key in keys)]


def _vllm_config(case: Case) -> Iterator[Finding]:
    """What ``PEFTHelper`` refuses."""
    if not case.config or _peft_type(case.adapter) != PLAIN:
        return
    init = case.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in VLLM_INITS:
        text = f"init_lora_weights {init!a:.30} changes the base: refused since {VLLM_PATTERNS}, ignored before"
        yield error("init", text, "convert it with PEFT to a plain LoRA first")
    for name, what in VLLM_UNREAD.items():
        # Trained biases of B have a rule of their own.
        if case.config.get(name) and not (name == "lora_bias" and _extra_keys(case.adapter, *BIASES)):
            text = f"{what} is refused since {VLLM_PATTERNS}, and was ignored before"
            yield error("unsupported", text, "serve it with PEFT")


def _declared_bias(case: Case) -> Iterator[Finding]:
    """The configuration says that biases were trained, and the file has none."""
    bias = case.config.get("bias")
    if bias in (None, "none") or _extra_keys(case.adapter, *BIASES):
        return
    text = f"bias is {bias!a:.20} in adapter_config.json, and the file has no biases: "
    if case.consumer == "vllm":
        yield error("bias", text + "vLLM refuses it", _for("vllm", " --drop-extra writes bias none"))
        return
    # A model without biases has none to train.
    keys = case.match.keys if case.match else {}
    lost = [name for name, key in keys.items() if key.removesuffix("weight") + "bias" in case.base]
    fix = "take them from a checkpoint of the training; without one, set bias to none and test the outputs"
    if lost:
        yield error("bias", f"{text}the base has {len(lost)} of these, and keeps its own", fix)
    elif not keys:
        yield warning("bias", f"{text}nothing is lost only if the base has none either", f"{fix}; --base DIR tells")


def _largest_rank(adapter: Adapter) -> int:
    """The largest rank of any module, or of the configuration, which a server reads whatever the modules are."""
    declared = (adapter.config or {}).get("r") if adapter.format == "peft" else None
    # A hostile configuration may have anything for r; True is an int too.
    ranks = [module.rank for module in adapter.modules.values()]
    return max([*ranks, declared] if type(declared) is int else ranks, default=0)


def _vllm_rank(case: Case) -> Iterator[Finding]:
    """No rank of the configuration may be above --max-lora-rank."""
    rank = _largest_rank(case.adapter)
    if rank > VLLM_RANKS[-1]:
        text = f"rank {rank} is more than any --max-lora-rank takes ({VLLM_RANKS[-1]})"
        yield error("rank", text, _for("vllm", " reduces it"))
    elif rank > VLLM_RANK:
        fitting = next(r for r in VLLM_RANKS if r >= rank)
        text = f"rank {rank} is above the default limit of {VLLM_RANK}"
        yield warning("rank", text, f"serve with --max-lora-rank {fitting}, or {_for('vllm', ' --rank 16')}")


def _above(text: str, fix: str) -> Find:
    """The rule that no rank is above `Client.most_rank`; text and fix have the ``{rank}``, and that as ``{most}``."""

    def rule(case: Case) -> Iterator[Finding]:
        rank, most = _largest_rank(case.adapter), case.client.most_rank or 0
        if rank > most:
            yield warning("rank", text.format(rank=rank, most=most), fix.format(rank=rank))

    return rule


def _lorax_ranks(case: Case) -> Iterator[Finding]:
    """``LoraWeights`` stacks the layers of a kind, padded by ``pad_rank`` of utils/punica.py."""
    ranks: dict[str, set[int]] = {}
    for name, module in case.adapter.items():
        # Compared are the ranks to which LoRAX pads: 3 and 7 can be stacked, 8 and 9 cannot.
        padded = 8 if module.rank <= 8 else -(-module.rank // LORAX_STEP) * LORAX_STEP
        ranks.setdefault(kind(name), set()).add(padded)
    mixed = [kind for kind, paddings in ranks.items() if len(paddings) > 1]
    if mixed:
        text = f"layers of one kind have several ranks, which cannot be stacked: {some(mixed)}"
        yield error("ranks", text, _for("lorax", " pads them to one rank"))


def incomplete_groups(names: Iterable[str]) -> dict[str, str]:
    """Module that SGLang needs beside another, because it joins their factors → that other module.

    It looks for v where there is a q, and for q where there is k or v; up without gate is skipped.
    """
    present = dict.fromkeys(names)  # in their order, so that every run names the same module
    missing: dict[str, str] = {}
    for name in present:
        owner, _, last = name.rpartition(".")
        needed = {
            "q_proj": ("v_proj",),
            "k_proj": ("q_proj", "v_proj"),
            "v_proj": ("q_proj",),
            "up_proj": ("gate_proj",),
        }
        siblings = [f"{owner}.{other}" for other in needed.get(last, ())]
        # SGLang asks for the k of a layer only if the layer has one.
        missing |= {sibling: name for sibling in siblings if sibling not in present}
    return missing


def _sglang_groups(case: Case) -> Iterator[Finding]:
    if missing := incomplete_groups(case.adapter):
        name = min(missing)
        text = f"SGLang joins q, k and v, and gate and up: {missing[name]} is there without {name.rpartition('.')[2]}"
        yield error("incomplete", text, _for("sglang", " adds the missing modules, as zeros"))


def _sglang_tokens(case: Case) -> Iterator[Finding]:
    """``load_lora_adapter`` refuses tokens beyond the vocabulary of the base."""
    rows = [shape[0] for key, shape in case.base.items() if key.endswith(("embed_tokens.weight", "wte.weight"))]
    added = [token for token in case.added_tokens if not rows or token >= rows[0]]
    if added and rows:
        text = (
            f"added_tokens.json adds {len(added)} tokens to the {rows[0]} of the base, and SGLang refuses such adapters"
        )
        yield error("added-tokens", text, "merge the adapter into its base")
    elif added:
        text = f"added_tokens.json lies beside it; SGLang refuses the adapter if one of its {len(added)} tokens is new"
        yield warning("added-tokens", text, "give --base; remove the file if it is a copy of the base's")


def _ollama_alpha(case: Case) -> Iterator[Finding]:
    alpha = case.config.get("lora_alpha")
    if case.config and (type(alpha) is not int or alpha <= 0):
        text = f"lora_alpha is {alpha!a:.20}, and Ollama reads a whole number above 0, written without a point"
        yield error("alpha", text, _for("ollama", " --base MODEL"))


def _ollama_names(case: Case) -> list[str]:
    """Modules whose names the converter does not turn into those of a GGUF file."""
    names = re.compile(rf"model\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(LLAMA)})$")
    return [name for name in case.adapter if case.adapter.format == "peft" and not names.match(name)]


def _ollama_base(case: Case) -> Iterator[Finding]:
    if case.adapter.format != "peft":
        return
    fix = _for("ollama", " --base MODEL writes GGUF, which has no such limit")
    named = OTHER_FAMILIES.search(case.adapter.base_model or "")
    family = case.architecture or (named[0] if named else None)
    if family and family not in OLLAMA_FAMILIES:
        text = f"Ollama converts adapters of Llama and Gemma 2 alone, and the base is of {family}"
        yield error("architecture", text, fix)
    elif "gemma" not in (case.architecture or case.adapter.base_model or "").lower():
        rotary = [name for name in case.adapter if name.endswith((".q_proj", ".k_proj"))]
        if rotary:
            text = f"Ollama reorders A of {len(rotary)} modules, q and k, in place of the rows of B: {some(rotary, 1)}"
            yield error("rows", text, fix)


def _one_alpha(case: Case) -> Iterator[Finding]:
    """α/rank of each tensor, with one α for the file. Scales read from a GGUF file are of this form."""
    if case.adapter.format != "gguf" and len({module.scale for module in case.adapter.modules.values()}) > 1:
        fix = "loralens convert --to gguf folds each scale into B"
        yield warning("mixed-scale", "holds one α for all modules", fix)


def experts_differ(adapter: Adapter) -> Iterator[Finding]:
    """Experts stored as modules of their own that differ in rank or scale: PEFT joins them and loads none.

    With transformers 5.
    """
    # In a file that stores whole stacks, all experts have one rank and one scale anyway.
    alone = [module for name, module in adapter.items() if is_expert_alone(name)]
    if len({(module.rank, module.scale) for module in alone}) > 1:
        text = (
            "experts that are modules of their own differ in rank or scale: transformers 5 joins them into one stack, "
            "and PEFT has one rank and one α for that"
        )
        yield error("experts-differ", text, "give them one rank: loralens compress … --uniform")


def _gguf_extra(*, norms: bool) -> Callable[[Case], list[str]]:
    def choose(case: Case) -> list[str]:
        keys = case.adapter.extra if case.adapter.format == "gguf" else ()
        return [key for key in keys if key.endswith("_norm.weight") == norms]

    return choose


def _trt_names(case: Case) -> list[str]:
    """Modules whose names do not match ``HF_LORA_PATTERN``, which does not read what stands before the number."""
    return [name for name in case.adapter if not TRT_NAME.match(name)]


def _mlx_config(case: Case) -> Iterator[Finding]:
    config = case.adapter.config
    if case.adapter.format != "mlx" or config is None:
        return
    section = config.get("lora_parameters")
    section = section if isinstance(section, dict) else {}
    missing = [name for name in ("rank", "scale", "dropout") if section.get(name) is None]
    missing = [f"lora_parameters.{name}" for name in missing] + ["num_layers"] * (config.get("num_layers") is None)
    if missing:
        text = f"adapter_config.json has no {', '.join(missing)}, and mlx-lm raises an error then"
        yield error("config", text, _for("mlx", " writes them"))
    other = [name for name, module in case.adapter.items() if section.get("rank") not in (None, module.rank)]
    if other:
        made = f"{section['rank']!a:.10}"
        text = f"mlx-lm makes layers of rank {made}, and {len(other)} modules have another: {some(other, 1)}"
        yield error("ranks", text, "correct lora_parameters.rank in adapter_config.json")


def _peft_others(case: Case) -> Iterator[Finding]:
    """Other tensors have an effect only where the model has a parameter of the same name."""
    if case.adapter.format != "peft":
        return
    others = [key for key, extra in case.adapter.extra.items() if extra.role == "other"]
    lost = [
        key for key in others if not key.startswith(PREFIX) or (case.base and key.removeprefix(PREFIX) not in case.base)
    ]
    if lost:
        yield error("extra-ignored", f"PEFT ignores {len(lost)} other tensors: {some(lost, 1)}", DROP)
    elif others and not case.base:
        text = f"PEFT loads {len(others)} other tensors only where the base has their names: {some(others, 1)}"
        yield warning("extra-ignored", text, "give --base DIR, which tells")


DROP = "loralens convert … --drop-extra if the base's own serve as well"


def _diffusers_component(case: Case) -> list[str]:
    """Modules of a file in diffusers' own names that do not say to which component they belong."""
    return [name for name in case.adapter if case.adapter.format == "diffusers" and not name.startswith(COMPONENTS)]


COMPONENTS = (*image_names.ENCODERS, "unet.", "transformer.", "transformer_2.", "prior.", "connectors.")


def _dora(case: Case) -> list[str]:
    return ["use_dora"] * bool(case.config.get("use_dora")) + _extra_keys(case.adapter, *MAGNITUDES)


def _expression(case: Case) -> list[str]:
    targets = case.config.get("target_modules")
    return [f"{targets!a:.40}"] if isinstance(targets, str) and targets not in ("all", "all-linear") else []


def _other_ranks(case: Case) -> list[str]:
    r = case.config.get("r")
    return [name for name, module in case.adapter.items() if type(r) is int and module.rank != r]


def _extras(*roles: str) -> Callable[[Case], list[str]]:
    return lambda case: _extra_keys(case.adapter, *roles)


def _others(case: Case) -> list[str]:
    """Tensors beside the pairs, other than magnitudes and biases, which have rules of their own."""
    return [key for key, extra in case.adapter.extra.items() if extra.role not in (*MAGNITUDES, *BIASES)]


SAVED = "{title} refuses or ignores modules that were trained in full: {first}"

HELPER, TENSORS, LORA_PY = "vllm/lora/peft_helper.py", "vllm/lora/lora_model.py", "python/sglang/srt/lora/lora.py"
SGL_CONFIG, SGL_MANAGER = "python/sglang/srt/lora/lora_config.py", "python/sglang/srt/lora/lora_manager.py"
TRT, LORAX = "tensorrt_llm/lora_manager.py", "server/lorax_server/adapters/lora.py"
OLLAMA, LLAMA_CPP = "convert/convert.go", "src/llama-adapter.cpp"
COMFY, ADAPTERS, SD_SCRIPTS = "comfy/lora.py", "comfy/weight_adapter/base.py", "networks/lora.py"
PIPELINE, CONVERTERS = "loaders/lora_pipeline.py", "loaders/lora_conversion_utils.py"
STATES, MLX, VLLM_UTILS = "utils/save_and_load.py", "mlx_lm/tuner/utils.py", "vllm/lora/utils.py"
OLLAMA_LLAMA = "convert/convert_llama_adapter.go"
SERVERS: Mapping[Consumer, str] = {
    "vllm": HELPER, "sglang": SGL_CONFIG, "lorax": LORAX, "tensorrt-llm": TRT, "ollama": OLLAMA
}  # fmt: skip

RULES: tuple[Rule, ...] = (
    Rule(_dialect, {**SERVERS, "llama.cpp": LLAMA_CPP, "mlx": MLX, "diffusers": PIPELINE, "peft": "config.py"}),
    Rule(_configured, {**SERVERS, "mlx": MLX, "peft": "config.py"}),
    Rule(_typed, {"sglang": LORA_PY, "lorax": LORAX, "peft": "config.py"}),
    Rule(_fields("r", "lora_alpha", "target_modules"), {"vllm": HELPER, "sglang": SGL_CONFIG}),
    Rule(_fields("r", "lora_alpha"), {"tensorrt-llm": TRT}),
    Rule(_only_lora, SERVERS),
    Rule(NO_STRUCTURE, {"llama.cpp": LLAMA_CPP, "diffusers": PIPELINE, "mlx": MLX}),
    Rule(_peft_structure, {"peft": "tuners/lora/model.py"}),
    Rule(_about("dora", _dora, "{title} has no DoRA of this form: it refuses it, or ignores the magnitudes",
                "merge the adapter into its base, or train a plain LoRA"), {**SERVERS, "llama.cpp": LLAMA_CPP}),
    Rule(_about("dora", lambda case: [key for key in case.adapter.extra if key.endswith(".dora_scale")],
                "diffusers leaves {count} dora_scale out", "merge it into the base"), {"diffusers": PIPELINE}),
    Rule(_about("bias", _extras(*BIASES), "{title} refuses or ignores {count} trained biases",
                "loralens convert … --drop-extra"), {**SERVERS, "llama.cpp": LLAMA_CPP}),
    Rule(_declared_bias, {"vllm": HELPER, "peft": STATES, "lorax": LORAX, "sglang": SGL_CONFIG, "tensorrt-llm": TRT}),
    Rule(_about("experts", lambda case: [name for name, one in case.adapter.items() if one.layout.kind == "experts"],
                "expert stacks are dropped or transposed by many versions", "test the outputs against the base",
                "warning"),
         {"vllm": "vllm/lora/model_manager.py", "sglang": LORA_PY, "lorax": LORAX, "tensorrt-llm": TRT}),
    Rule(_wrapped, {"vllm": TENSORS, "lorax": LORAX, "tensorrt-llm": TRT, "peft": STATES, "ollama": OLLAMA, "mlx": MLX,
                    "comfyui": COMFY, "diffusers": PIPELINE, "sd-scripts": SD_SCRIPTS}),
    Rule(_other_names, {"vllm": TENSORS, "lorax": LORAX, "peft": STATES, "mlx": MLX}),
    # Names without ``base_model.model.`` are passed over.
    Rule(_read_as_error("prefix-missing"), {"lorax": LORAX}),
    Rule(_wrong_scale, {"sglang": LORA_PY, "lorax": LORAX, "tensorrt-llm": TRT, "ollama": OLLAMA}),
    # vLLM: modules_to_save may be score or classifier, for classification; an embedding's own weight is skipped.
    Rule(_about("saved-modules", _vllm_saved("refused"), SAVED, DROP), {"vllm": VLLM_UTILS}),
    Rule(_about("saved-modules", _vllm_unsaved,
                "modules_to_save has {first}, of which the file has no tensors, and vLLM refuses it",
                _for("vllm", " --drop-extra if the base's own serve as well")), {"vllm": HELPER}),
    Rule(_about("saved-head", _vllm_saved("loaded"),
                "{first} is loaded only where the model is served for classification, and refused before 0.31",
                "serve it with --runner pooling, or drop the head with --drop-extra", "warning"),
         {"vllm": VLLM_UTILS}),
    Rule(_about("embedding-skipped", _vllm_saved("skipped"),
                "the embedding that stands in the file is skipped: {first}",
                "nothing is lost if it is the base's own; else merge the adapter", "warning"), {"vllm": VLLM_UTILS}),
    Rule(_vllm_config, {"vllm": HELPER}),
    Rule(_old_scale, {"vllm": HELPER}),
    Rule(_vllm_rank, {"vllm": "vllm/config/lora.py"}),
    Rule(_about("targets", _expression, "target_modules is the expression {first}, and SGLang reads lists",
                _for("sglang", " writes a list")), {"sglang": "python/sglang/srt/lora/utils.py"}),
    Rule(_about("ranks", _other_ranks,
                "{title} has buffers of the rank r of the configuration, and {count} modules have another: {first}",
                _for("sglang", " pads them to one rank")), {"sglang": "python/sglang/srt/lora/mem_pool.py"}),
    Rule(_sglang_groups, {"sglang": LORA_PY}),
    Rule(_sglang_tokens, {"sglang": SGL_MANAGER}),
    Rule(_about("extra-ignored", _others, "{title} refuses or ignores {count} other tensors: {first}", DROP),
         {"sglang": LORA_PY, "lorax": LORAX, "tensorrt-llm": TRT, "ollama": OLLAMA, "diffusers": PIPELINE, "mlx": MLX}),
    Rule(_about("saved-modules", _extras(*TRAINED_IN_FULL), SAVED, DROP), {"llama.cpp": LLAMA_CPP}),
    # Adapters of a larger rank are applied outside the kernels, one by one.
    Rule(_above("rank {rank} is more than the kernels take ({most})",
                f"it is applied without them, slowly: {_for('lorax', ' reduces its rank')}"),
         {"lorax": "server/lorax_server/utils/punica.py"}),
    Rule(_lorax_ranks, {"lorax": LORAX}),
    Rule(_about("names-unmapped", _trt_names,
                "{count} modules have names that TensorRT-LLM refuses or does not map: {first}",
                "merge the adapter into its base"), {"tensorrt-llm": TRT}),
    Rule(_above("rank {rank} is above the default limit of {most}",
                f"set max_lora_rank={{rank}} in LoraConfig, or {_for('tensorrt-llm')}"),
         {"tensorrt-llm": "tensorrt_llm/lora_helper.py"}),
    Rule(_ollama_alpha, {"ollama": OLLAMA}),
    Rule(_ollama_base, {"ollama": OLLAMA_LLAMA}),
    Rule(_about("names-unmapped", _ollama_names,
                "{count} modules have names that Ollama does not turn into those of GGUF: {first}",
                _for("ollama", " --base MODEL")), {"ollama": OLLAMA_LLAMA}),
    Rule(_about("version", lambda case: [case.adapter.format] if case.adapter.format in case.client.reads else [],
                "Ollama 0.34.1 and later reject ADAPTER in a new Modelfile; models made before still run", MERGE_GGUF,
                "warning"), {"ollama": "pull request 14969 of ollama"}),
    Rule(_one_alpha, {"llama.cpp": LLAMA_CPP}),
    # ``*_norm.weight`` is passed over, any other tensor refused.
    Rule(_about("tensors", _gguf_extra(norms=False), "the file is refused for {first}",
                "loralens convert … --drop-extra"), {"llama.cpp": LLAMA_CPP, "ollama": "llm/llama_server.go"}),
    Rule(_about("extra-ignored", _gguf_extra(norms=True), "norms are ignored: {first}", "merge them into the base"),
         {"llama.cpp": LLAMA_CPP}),
    Rule(_mlx_config, {"mlx": MLX}),
    Rule(_comfyui_names, {"comfyui": COMFY}),
    Rule(_comfyui_scale, {"comfyui": COMFY}),
    # An α of 0 is a scale of 0, where sd-scripts and LyCORIS take α = r.
    Rule(_about("alpha-zero",
                lambda case: [name for name, one in case.adapter.items() if one.scaling.origin.startswith("alpha 0")],
                "ComfyUI takes α = 0 as a scale of 0, others as α = r: {count} modules do nothing, {first}",
                TO_COMFYUI), {"comfyui": "comfy/weight_adapter/lora.py"}),
    Rule(_comfyui_dora, {"comfyui": ADAPTERS}),
    Rule(_about("extra-ignored", _ignored_by_comfyui, "{count} tensors that do not belong to a pair are ignored",
                "merge them into the base"), {"comfyui": COMFY}),
    Rule(_kohya, {"sd-scripts": SD_SCRIPTS}),
    Rule(_about("names-unmapped", _diffusers_component,
                "{count} modules do not name their component of the pipeline, and a pipeline loads none of them: "
                "{first}", "loralens convert … --prefix =transformer. (or =unet.) names it"), {"diffusers": PIPELINE}),
    Rule(_diffusers_names, {"diffusers": CONVERTERS}),
    Rule(_other_families, {"diffusers": CONVERTERS, "comfyui": COMFY}),
    Rule(lambda case: experts_differ(case.adapter), {"peft": "utils/transformers_weight_conversion.py"}),
    # ``load_state_dict`` with ``strict=False``.
    Rule(_read_as_error(*READ_AS_ERRORS), {"peft": STATES}),
    Rule(lambda case: lost_heads(case.adapter), {"peft": STATES}),
    Rule(_peft_others, {"peft": STATES}),
    Rule(_peft_kernels, {"peft": "tuners/lora/layer.py"}),
)  # fmt: skip
