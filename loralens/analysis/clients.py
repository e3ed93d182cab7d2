"""The rules that tell what a consumer would reject, or silently ignore, in an adapter, each with a fix.

Every rule was read from the code of the consumer. Its docstring names the file; these are the versions:

============  =======================================================================================================
vllm          vLLM 0.33.0 and back to 0.28.0, ``vllm/lora/`` and ``vllm/config/lora.py``
lorax         LoRAX 0.12.1 and main of 2026-05-28, ``server/lorax_server/``
llama.cpp     llama.cpp at commit 0650ea8c, ``src/llama-adapter.cpp``
comfyui       ComfyUI 0.3.64, ``comfy/lora.py`` and ``comfy/weight_adapter/``
sd-scripts    sd-scripts 0.10.1, ``networks/lora.py``
peft          PEFT 0.21.2
============  =======================================================================================================
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isclose, sqrt
from typing import Literal

from loralens.choices import Consumer, Level
from loralens.core import image_names
from loralens.core.adapter import Adapter, Finding
from loralens.core.image_models import image_model
from loralens.core.matching import Match, Shape
from loralens.core.names import is_convolution_name, is_expert_alone, kind, some
from loralens.core.structured import Structured
from loralens.core.together import MAGNITUDES, TASK_HEADS

ClientRule = Callable[[Adapter], Iterable[Finding]]
Rules = tuple[ClientRule, ...]

# ComfyUI skips an unknown name and writes a line to its log. The ``load_state_dict`` of sd-scripts is not strict, so
# unknown names are skipped too.
READ = ("comfyui", "kohya", "lycoris", "diffusers", "peft", "xlabs")  # dialects of which ComfyUI knows some names
OWN = ("comfyui", "kohya", "lycoris")  # dialects that it reads completely
ALGORITHMS = (  # endings of keys from which comfy/weight_adapter builds updates that are not pairs here
    ".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".oft_blocks", ".rescale",
)  # fmt: skip
_OTHERS = "(of other models than SD, SDXL and FLUX.1 with --base PIPELINE, the folder of the whole pipeline)"
TO_COMFYUI = f"loralens convert … --to comfyui {_OTHERS}"
TO_KOHYA = f"loralens convert … --to kohya {_OTHERS}"
RENAME_KOHYA = "loralens convert … --to kohya"


error = partial(Finding, "error")  # about what makes a consumer refuse an adapter, or apply a different update
warning = partial(Finding, "warning")  # about what a consumer ignores, or handles differently in some versions


def _about(level: Level, code: str, choose: Callable[[Adapter], Sequence[str]], text: str, fix: str) -> ClientRule:
    """The rule that nothing may be chosen; its text has the ``{count}`` of the names that are, and the ``{first}``."""

    def rule(adapter: Adapter) -> Iterator[Finding]:
        if names := choose(adapter):
            yield Finding(level, code, text.format(count=len(names), first=some(names, 1)), fix)

    return rule


def _extra_keys(adapter: Adapter, *roles: str) -> list[str]:
    """The keys of the tensors with these roles."""
    return [key for key, extra in adapter.extra.items() if extra.role in roles]


def _read_as_error(*codes: str) -> ClientRule:
    """The rule that findings of the reader with these codes are errors."""
    return lambda adapter: (replace(one, level="error") for one in adapter.findings if one.code in codes)


def _comfyui_names(adapter: Adapter) -> Iterator[Finding]:
    """``model_lora_keys_unet`` and ``model_lora_keys_clip`` of comfy/lora.py, ``convert_lora`` of lora_convert.py."""
    stored, files = stored_keys(adapter), _comfyui_files(adapter)
    unknown = {name: file for name, (file, known) in files.items() if not known}
    # If ComfyUI knows no name at all, the dialect is the reason, and a list of names would not help.
    if adapter.format == "xlabs" and unknown:
        yield error("dialect", "ComfyUI reads XLabs' names only where all blocks of FLUX are there", TO_COMFYUI)
    elif adapter.format not in READ or (unknown and len(unknown) == len(stored) and adapter.format not in OWN):
        yield error("dialect", f"is {adapter.format}, and ComfyUI reads {', '.join(OWN)}", TO_COMFYUI)
    else:
        yield from _report_unknown(unknown, len(stored), "ComfyUI", TO_COMFYUI)
        # Its maps of diffusers' transformers: SD3, FLUX, AuraFlow, PixArt, HunyuanVideo, HiDream, Qwen-Image.
        unsure = [file for file, known in files.values() if known and image_names.comfyui_may_lack(file)]
        if unsure:
            text = f"{len(unsure)} modules have names that no map of ComfyUI 0.3.64 has: {some(unsure, 1)}"
            yield warning("names-unmapped", text, "load it in ComfyUI, and look for 'lora key not loaded' in its log")


def _comfyui_files(adapter: Adapter) -> dict[str, tuple[str, bool]]:
    """The name of each module in the file, and whether ComfyUI can know that name."""
    stored = stored_keys(adapter)
    # ComfyUI renames XLabs' names only in a complete file, by its ``convert_uso_lora``.
    if adapter.format == "xlabs":
        is_uso = image_names.is_uso(key for keys in stored.values() for key in keys)
        return {name: (keys[0], is_uso) for name, keys in stored.items()}
    files = {name: image_names.file_name(keys) for name, keys in stored.items()}
    return {
        name: (stored[name][0], False) if file is None else (file, image_names.comfyui_has(file))
        for name, file in files.items()
    }


def stored_keys(adapter: Adapter) -> dict[str, list[str]]:
    """The keys of each module in its file, for modules that were read from a file."""
    return {name: list(module.origin.tensors) for name, module in adapter.items() if module.origin}


def _report_unknown(unknown: dict[str, str], count: int, consumer: str, fix: str) -> Iterator[Finding]:
    if unknown:
        text = f"{consumer} ignores {len(unknown)} of {count} modules, whose names it does not have"
        yield error("names", f"{text}: {some(unknown.values(), 1)}", fix)


def _comfyui_scale(adapter: Adapter) -> Iterator[Finding]:
    """``load_lora``: the scale is α/rank with the ``.alpha`` beside a pair, and 1 without; nothing else is read."""
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


def _comfyui_dora(adapter: Adapter) -> Iterator[Finding]:
    """``weight_decompose`` of weight_adapter/base.py, for a ``dora_scale``; no other name of a magnitude is read."""
    magnitudes = {key: extra for key, extra in adapter.extra.items() if extra.role.startswith("magnitude")}
    unread = [key for key in magnitudes if not key.endswith(".dora_scale")]
    if unread:
        yield error("dora", f"DoRA magnitudes are ignored: {some(unread, 1)}", "merge it into the base")
    # ComfyUI and LyCORIS agree on magnitudes by input, so "magnitude_in" needs no warning.
    if any(extra.role == "magnitude" for key, extra in magnitudes.items() if key not in unread):
        text = "ComfyUI divides by ‖W‖, not ‖W+ΔW‖, on the output axis: DoRA has another effect than in training"
        yield warning("dora", text, "merge it into the base")


def _ignored_by_comfyui(adapter: Adapter) -> list[str]:
    """``load_lora``: ``diff``, ``diff_b``, ``set_weight``, ``w_norm``, ``b_norm``, ``reshape_weight``."""
    # "saved" is set_weight; a head that another dialect trained in full is ignored.
    applied = {"magnitude", "magnitude_in", "diff", "diff_b", "shape", *(["saved"] * (adapter.format == "comfyui"))}
    return [key for key, extra in adapter.extra.items() if extra.role not in applied and not key.endswith(ALGORITHMS)]


def _kohya(adapter: Adapter) -> Iterator[Finding]:
    """``LoRANetwork.create_modules`` and ``create_network_from_weights`` of networks/lora.py."""
    if adapter.format != "kohya":
        fix = "train and load it with network_module lycoris.kohya" if adapter.format == "lycoris" else TO_KOHYA
        yield error("dialect", f"is {adapter.format}, and networks.lora reads kohya", fix)
        return
    stored = stored_keys(adapter)
    files = {name: image_names.file_name(keys) or keys[0] for name, keys in stored.items()}
    unknown = {name: file for name, file in files.items() if not image_names.sd_scripts_has(file)}
    # A known model has one name for each layer.
    model = image_model({name: module.shape for name, module in adapter.items()}, (adapter.base_model,))
    if model is not None:
        right = {name: model.kohya(model.find(name, adapter[name].shape)[0]) for name in files}
        unknown |= {name: file for name, file in files.items() if file != right[name]}
    yield from _report_unknown(unknown, len(stored), "sd-scripts", TO_KOHYA if model is None else RENAME_KOHYA)
    # It has no DoRA: ``dora_scale`` is one of the keys that ``load_state_dict`` passes over.
    magnitudes = _extra_keys(adapter, "magnitude", "magnitude_in")
    if magnitudes:
        fix = "load it with network_module lycoris.kohya, or merge it into the base"
        yield error("dora", "networks.lora has no DoRA: magnitudes are ignored", fix)
    if unread := [key for key in adapter.extra if key not in magnitudes]:
        text = f"{len(unread)} tensors that do not belong to a pair are ignored: {some(unread, 1)}"
        yield warning("extra-ignored", text, "merge them into the base")


# Codes of the reader of PEFT's dialect about what PEFT raises an error for (the first), or passes over.
READ_AS_ERRORS = ("rank-disagrees", "module-untargeted", "prefix-missing", "switched-off")
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


def _configured(adapter: Adapter) -> Iterator[Finding]:
    """``PeftConfig.from_pretrained`` of config.py raises without ``adapter_config.json``; so do vLLM and LoRAX."""
    # An adapter in memory has no file, and gets its configuration when it is written.
    if adapter.format == "peft" and adapter.config is None and stored_keys(adapter):
        fix = "put the configuration of the training beside it; loralens convert … --to peft --alpha A writes one"
        yield error("config", "there is no adapter_config.json, and the file is refused without one", fix)


def _typed(adapter: Adapter) -> Iterator[Finding]:
    """``PeftConfig._get_peft_type`` of config.py: a KeyError."""
    # An adapter in memory gets the field when it is written.
    config = adapter.config if adapter.format == "peft" and stored_keys(adapter) else None
    if config is not None and config.get("peft_type") is None:
        text = "adapter_config.json has no peft_type, and PEFT raises a KeyError then"
        yield error("config", text, "loralens convert … --to peft writes it")


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


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank: MaxLoRARanks, config/lora.py
VLLM_RANK = 16  # the default of --max-lora-rank
VLLM_PATTERNS = "0.32.0"  # the first version that reads rank_pattern and alpha_pattern: peft_helper.py
# Initialisations that do not change the base: peft_helper.py. Others, such as PiSSA, take a part of W into the factors.
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
VLLM_UNREAD = {  # fields of a configuration that 0.32.0 refuses and earlier versions ignore: peft_helper.py
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "layer_replication",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
}
VLLM_HEADS = ("score", "classifier")  # the only modules that may be trained in full: peft_helper.py, lora/utils.py
VLLM_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")  # is_base_embedding_weights
LORAX_RANK = 128  # the largest rank of its batched kernels: BGMV_MAX_RANK, utils/punica.py
LORAX_STEP = 16  # SGMV_BLOCK_SIZE, to a multiple of which larger ranks are padded; ranks up to 8 are padded to 8
PLAIN = "LORA"  # the peft_type of plain pairs
SAME = 1e-9  # relative difference up to which two scales are equal: α/r is a quotient that was rounded to float64
TRAINED_IN_FULL = ("saved", "copy", "embedding", "tokens")  # roles of tensors that replace a part of the base


def check(
    adapter: Adapter, consumer: Consumer, match: Match | None = None, base: Mapping[str, Shape] | None = None
) -> list[Finding]:
    """Find what ``consumer`` would reject or apply differently (errors), or ignore (warnings); errors come first.

    Parameters
    ----------
    adapter : Adapter
    consumer : str
        One of `CONSUMERS`.
    match : Match, optional
        How the names match the base. A name that matches only after an edit loads but has no effect.
    base : mapping of str to tuple of int, optional
        The shapes of the tensors of the base, if ``match`` is given.
    """
    findings = [finding for rule in CONSUMERS[consumer] for finding in rule(adapter)]
    if match and match.edit and consumer in BY_NAME:
        text = (
            f"{consumer} looks the names up as they are, and they match the base only after {match.edit}: most "
            "versions load such an adapter and do nothing"
        )
        # What the modules of a base are called that is stored under other names, its files do not say.
        unknown = "test the outputs against those of the base"
        fix = unknown if match.by_storage else "loralens convert … --base DIR writes it under the base's names"
        findings.append(warning("names-differ", text, fix))
    if consumer == "peft":
        findings += _peft_kernels(adapter, match, base or {})
    # Sorting is stable: among errors, and among warnings, the order of the rules stays.
    return sorted(findings, key=lambda finding: finding.level != "error")


# No consumer of pairs can apply a LoKr, LoHa or full update.
NO_STRUCTURE = _about(
    "error",
    "structured",
    lambda adapter: [name for name, module in adapter.items() if isinstance(module, Structured)],
    "{count} modules are not pairs B·A",
    "loralens convert … --rank R makes them pairs",
)


def _only_lora(adapter: Adapter) -> Iterator[Finding]:
    """Of the types of adapter that PEFT writes, the servers read only plain LoRA.

    vLLM: ``PEFTHelper`` of peft_helper.py does not read peft_type, and finds no lora_alpha in a LoHa or LoKr.
    ``parse_fine_tuned_lora_name`` of lora/utils.py refuses the tensors of AdaLoRA, LoHa and LoKr. LoRAX:
    ``LoraConfig.load`` of adapters/lora.py finds no lora_alpha in a LoHa or LoKr either. Of an AdaLoRA,
    ``map_weights_for_model`` finds no tensor, so that nothing is applied.
    """
    kind = _peft_type(adapter)
    if kind == PLAIN:
        yield from NO_STRUCTURE(adapter)
        return
    # A LoKr or LoHa becomes pairs only at a rank, which the user has to choose; an AdaLoRA has pairs already.
    rank = " --rank R" if any(isinstance(module, Structured) for module in adapter.modules.values()) else ""
    text = f"peft_type is {kind}, whose tensors are refused or not found: this reads {PLAIN} alone"
    yield error("peft-type", text, f"loralens convert … --to peft{rank} makes it one")


def _peft_structure(adapter: Adapter) -> Iterator[Finding]:
    """PEFT reads its own LoHa and LoKr files, as it reads all its own types; it reads no other structure."""
    if _peft_type(adapter) == PLAIN:
        yield from NO_STRUCTURE(adapter)


def _peft_kernels(adapter: Adapter, match: Match | None, base: Mapping[str, Shape]) -> Iterator[Finding]:
    """The A of a convolution has its kernel: ``update_layer`` of tuners/lora/layer.py, class ``_ConvNd``."""
    if adapter.format != "peft" or _peft_type(adapter) != PLAIN:
        return
    keys = match.keys if match else {}

    def is_wrong(name: str) -> bool:
        kind, kernel = adapter[name].layout.kind, adapter[name].layout.kernel
        if kind not in ("linear", "conv") or (match and name in match.places):
            return False
        return kernel != base[keys[name]][2:] if name in keys else kind == "linear" and is_convolution_name(name)

    wrong = [name for name in adapter if is_wrong(name)]
    if wrong:
        why = "is not that of its weight" if keys else "is missing, and its name is that of a convolution"
        text = f"the kernel in the factors of {some(wrong, 1)} {why}: PEFT does not load them"
        yield error("kernel", text, "convert the file that it was made from again, with --base")


def _peft_type(adapter: Adapter) -> str:
    declared = (adapter.config or {}).get("peft_type") if adapter.format == "peft" else None
    return str(declared or PLAIN)


def _no_dora(adapter: Adapter) -> Iterator[Finding]:
    """vLLM: ``_validate_features`` of peft_helper.py refuses. llama.cpp: "unexpected suffix". LoRAX never reads it."""
    dora = any(extra.role in MAGNITUDES for extra in adapter.extra.values())
    if dora or (adapter.config or {}).get("use_dora"):
        text = "DoRA is refused or its magnitudes are ignored"
        yield error("dora", text, "merge the adapter into its base, or train a plain LoRA")


def _vllm_saved(adapter: Adapter, outcome: Literal["loaded", "skipped", "refused"]) -> list[str]:
    """The keys of modules trained in full that vLLM loads as a head, skips as an embedding, or refuses."""

    def outcome_of(key: str) -> str:
        if key.split(".")[-2:-1] and key.split(".")[-2] in VLLM_HEADS:
            return "loaded"
        return "skipped" if key.endswith(VLLM_SKIPPED) else "refused"

    return [key for key in _extra_keys(adapter, *TRAINED_IN_FULL) if outcome_of(key) == outcome]


def _vllm_config(adapter: Adapter) -> Iterator[Finding]:
    """What ``PEFTHelper`` of peft_helper.py needs, and what it refuses."""
    if adapter.format != "peft" or adapter.config is None or _peft_type(adapter) != PLAIN:
        return
    missing = [field for field in ("r", "lora_alpha", "target_modules") if adapter.config.get(field) is None]
    if missing:
        text = f"adapter_config.json has no {', '.join(missing)}, and vLLM refuses it then"
        yield error("config", text, "put the fields there: loralens convert … --to peft writes them")
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in VLLM_INITS:
        text = f"init_lora_weights {init!a:.30} changes the base: refused since {VLLM_PATTERNS}, ignored before"
        yield error("init", text, "convert it with PEFT to a plain LoRA first")
    for field, name in VLLM_UNREAD.items():
        if adapter.config.get(field):
            text = f"{name} is refused since {VLLM_PATTERNS}, and was ignored before"
            yield error("unsupported", text, "serve it with PEFT")


def _largest_rank(adapter: Adapter) -> int:
    """The largest rank of any module, or of the configuration, which a server reads whatever the modules are."""
    declared = (adapter.config or {}).get("r") if adapter.format == "peft" else None
    # A hostile configuration may have anything for r; True is an int too.
    ranks = [module.rank for module in adapter.modules.values()]
    return max([*ranks, declared] if type(declared) is int else ranks, default=0)


def _vllm_rank(adapter: Adapter) -> Iterator[Finding]:
    """``validate_legal``: no rank of the configuration may be above --max-lora-rank."""
    rank = _largest_rank(adapter)
    if rank > VLLM_RANKS[-1]:
        yield error("rank", f"rank {rank} is more than any --max-lora-rank takes ({VLLM_RANKS[-1]})", "reduce its rank")
    elif rank > VLLM_RANK:
        fitting = next(r for r in VLLM_RANKS if r >= rank)
        text = f"rank {rank} is above the default limit of {VLLM_RANK}"
        yield warning("rank", text, f"serve with --max-lora-rank {fitting}")


def _lorax_rank(adapter: Adapter) -> Iterator[Finding]:
    """``can_vectorize`` of adapters/lora.py: adapters of a larger rank are applied outside the kernels, one by one."""
    rank = _largest_rank(adapter)
    if rank > LORAX_RANK:
        text = f"rank {rank} is more than the kernels take ({LORAX_RANK})"
        yield warning("rank", text, "it is applied without them, slowly: reduce its rank with loralens compress")


def _lorax_ranks(adapter: Adapter) -> Iterator[Finding]:
    """``LoraWeights`` of adapters/lora.py stacks the layers of a kind, padded by ``pad_rank`` of utils/punica.py."""
    ranks: dict[str, set[int]] = {}
    for name, module in adapter.items():
        # Compared are the ranks to which LoRAX pads: 3 and 7 can be stacked, 8 and 9 cannot.
        padded = 8 if module.rank <= 8 else -(-module.rank // LORAX_STEP) * LORAX_STEP
        ranks.setdefault(kind(name), set()).add(padded)
    mixed = [kind for kind, paddings in ranks.items() if len(paddings) > 1]
    if mixed:
        text = f"layers of one kind have several ranks, which cannot be stacked: {some(mixed)}"
        yield error("ranks", text, "give them one rank: loralens compress … --uniform")


def _one_alpha(adapter: Adapter) -> Iterator[Finding]:
    """``get_scale``: α/rank of each tensor, with one α for the file. Scales read from a GGUF file are of this form."""
    if adapter.format != "gguf" and len({module.scale for module in adapter.modules.values()}) > 1:
        fix = "loralens convert --to gguf folds each scale into B"
        yield warning("mixed-scale", "holds one α for all modules", fix)


def experts_differ(adapter: Adapter) -> Iterator[Finding]:
    """Experts stored as modules of their own that differ in rank or scale: PEFT joins them and loads none.

    ``peft/utils/transformers_weight_conversion.py`` of PEFT 0.21.2, with transformers 5.
    """
    # In a file that stores whole stacks, all experts have one rank and one scale anyway.
    alone = [module for name, module in adapter.items() if is_expert_alone(name)]
    if len({(module.rank, module.scale) for module in alone}) > 1:
        text = (
            "experts that are modules of their own differ in rank or scale: transformers 5 joins them into one stack, "
            "and PEFT has one rank and one α for that"
        )
        yield error("experts-differ", text, "give them one rank: loralens compress … --uniform")


def _gguf_extra(adapter: Adapter, *, norms: bool) -> list[str]:
    keys = adapter.extra if adapter.format == "gguf" else ()
    return [key for key in keys if key.endswith("_norm.weight") == norms]


def _must_be(form: str, adapter: Adapter) -> Iterator[Finding]:
    """Only this dialect is read."""
    if adapter.format != form:
        yield error("dialect", f"is {adapter.format}, and this reads {form}", f"loralens convert … --to {form}")


def _one_scale(who: str, fix: str, adapter: Adapter) -> Iterator[Finding]:
    """Every module must have the scale of the configuration; patterns with the same α/r are harmless."""
    config = adapter.config or {}
    patterns = [name for name in ("rank_pattern", "alpha_pattern") if config.get(name)]
    r, alpha = config.get("r"), config.get("lora_alpha")
    # Without r and α the configuration states no scale; that they are missing is a finding of another rule.
    if not patterns or not isinstance(r, int) or r <= 0 or not isinstance(alpha, int | float):
        return
    scale = alpha / sqrt(r) if config.get("use_rslora") else alpha / r
    wrong = [name for name, module in adapter.items() if not isclose(module.scale, scale, rel_tol=SAME)]
    if wrong and _peft_type(adapter) == PLAIN:
        modules = f"{len(wrong)} modules would get the wrong strength, {some(wrong, 1)}"
        yield error(patterns[0].replace("_", "-"), f"{who} {' and '.join(patterns)}: {modules}", fix)


BY_NAME = ("vllm", "lorax", "peft")  # consumers that look modules up under exactly the names of the base
SAVED = (
    "modules trained in full are refused or ignored: {first}",
    "loralens convert … --drop-extra if the base's own serve as well",
)
# vLLM: ``validate_legal`` (bias), ``parse_fine_tuned_lora_name``; the others as for modules trained in full.
NO_BIAS = _about(
    "error",
    "bias",
    lambda adapter: _extra_keys(adapter, "bias", "lora_bias"),
    "{count} trained biases are refused or ignored",
    "loralens convert … --drop-extra",
)
# LoRAX looks up lora_A and lora_B alone (``map_weights_for_model``); llama.cpp refuses other tensors.
NO_SAVED = _about("error", "saved-modules", lambda adapter: _extra_keys(adapter, *TRAINED_IN_FULL), *SAVED)
# vLLM: ``_stack_moe_lora_weights`` of model_manager.py, for some models and versions. LoRAX: none.
NO_EXPERTS = _about(
    "warning",
    "experts",
    lambda adapter: [name for name, module in adapter.items() if module.layout.kind == "experts"],
    "expert stacks are dropped or transposed by many versions",
    "test the outputs against the base",
)
PEFT_FORM = partial(_must_be, "peft")
SERVERS: Rules = (PEFT_FORM, _configured, _only_lora, _no_dora, NO_BIAS, NO_EXPERTS)
CONSUMERS: dict[Consumer, Rules] = {
    "vllm": (
        *SERVERS,
        # ``modules_to_save`` may be score or classifier, for classification; an embedding's own weight is skipped.
        _about("error", "saved-modules", lambda adapter: _vllm_saved(adapter, "refused"), *SAVED),
        _about(
            "warning",
            "saved-head",
            lambda adapter: _vllm_saved(adapter, "loaded"),
            "{first} is loaded only where the model is served for classification, and refused before 0.31",
            "serve it with --runner pooling, or drop the head with --drop-extra",
        ),
        _about(
            "warning",
            "embedding-skipped",
            lambda adapter: _vllm_saved(adapter, "skipped"),
            "the embedding that stands in the file is skipped: {first}",
            "nothing is lost if it is the base's own; else merge the adapter",
        ),
        _vllm_config,
        partial(
            _one_scale,
            f"vLLM before {VLLM_PATTERNS} ignores",
            f"serve with vLLM {VLLM_PATTERNS} or later, or give all modules one α/r",
        ),
        _vllm_rank,
    ),
    "lorax": (
        *SERVERS,
        # ``map_weights_for_model`` of adapters/lora.py skips names without ``base_model.model.``, as PEFT does.
        _read_as_error("prefix-missing"),
        NO_SAVED,
        partial(
            _one_scale,
            "LoRAX ignores",
            "give all modules one α/r: train so, or fold the scales with loralens convert --to mlx, then its result "
            "--to peft",
        ),
        _lorax_rank,
        _lorax_ranks,
    ),
    "llama.cpp": (
        partial(_must_be, "gguf"),
        NO_STRUCTURE,
        _no_dora,
        NO_SAVED,
        NO_BIAS,
        _one_alpha,
        # ``llama_adapter_lora_init_impl``: ``*_norm.weight`` is passed over, any other tensor refused.
        _about(
            "error",
            "tensors",
            lambda adapter: [
                key for key in adapter.extra if adapter.format == "gguf" and not key.endswith("_norm.weight")
            ],
            "the file is refused for {first}",
            "loralens convert … --drop-extra",
        ),
        _about(
            "warning",
            "extra-ignored",
            lambda adapter: _gguf_extra(adapter, norms=True),
            "norms are ignored: {first}",
            "merge them into the base",
        ),
    ),
    "comfyui": (
        _comfyui_names,
        _comfyui_scale,
        # ``LoRAAdapter.calculate_weight``: an α of 0 is a scale of 0, where sd-scripts and LyCORIS take α = r.
        _about(
            "error",
            "alpha-zero",
            lambda adapter: [name for name, one in adapter.items() if one.scaling.origin.startswith("alpha 0")],
            "ComfyUI takes α = 0 as a scale of 0, others as α = r: {count} modules do nothing, {first}",
            TO_COMFYUI,
        ),
        _comfyui_dora,
        _about(
            "warning",
            "extra-ignored",
            _ignored_by_comfyui,
            "{count} tensors that do not belong to a pair are ignored",
            "merge them into the base",
        ),
    ),
    "sd-scripts": (_kohya,),
    "peft": (
        PEFT_FORM,
        _peft_structure,
        experts_differ,
        _configured,
        _typed,
        # ``set_peft_model_state_dict`` of utils/save_and_load.py: ``load_state_dict`` with ``strict=False``.
        _read_as_error(*READ_AS_ERRORS),
        lost_heads,
    ),
}
