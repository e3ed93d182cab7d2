"""The rules that tell what PEFT 0.21.2 would reject, or pass over, in an adapter. Each was seen by running it."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from loralens.analysis.clients.image import error, stored_keys, warning
from loralens.core.adapter import Adapter, Finding
from loralens.core.carried import TASK_HEADS
from loralens.core.names import some

# Codes of the reader of PEFT's dialect about what PEFT raises an error for (the first), or passes over.
READ = ("rank-disagrees", "module-untargeted", "prefix-missing", "switched-off")
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


def configured(adapter: Adapter) -> Iterator[Finding]:
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


def _read(adapter: Adapter) -> Iterator[Finding]:
    """``set_peft_model_state_dict`` of utils/save_and_load.py: ``load_state_dict`` with ``strict=False``."""
    if adapter.format == "peft":
        yield from (replace(finding, level="error") for finding in adapter.findings if finding.code in READ)


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


RULES: tuple[Callable[[Adapter], Iterator[Finding]], ...] = (configured, _typed, _read, lost_heads)
