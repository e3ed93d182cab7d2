"""Statements of the configuration that the tensors contradict: the method, and a task whose head is not in the file."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination
from loralens.choices import Level
from loralens.core.carried import TASK_HEADS

CODES = {
    "peft-type": "adapter_config.json names another method than the one whose tensors are in the file: PEFT builds "
    "that method's layers, and finds none or only some of their tensors.",
    "head-missing": "The task needs a head that a pretrained base does not have, and the file does not have it either. "
    "PEFT refuses to load such a file, or predicts with a head of random numbers.",
}
# Part of a key → the method that stores such keys. AdaLoRA has lora_A too, so the more specific parts come first.
TELLING = {
    ".lora_E": "ADALORA",
    ".hada_": "LOHA",
    ".lokr_": "LOKR",
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".vera_lambda_": "VERA",
    ".ia3_": "IA3",
    ".lora_A": "LORA",
    ".lora_embedding_A": "LORA",
}
# Classes of transformers with a head that pretraining does not train.
CLASSES = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)(WithTeacher)?$")
# What models of transformers call these heads.
HEADS = frozenset({
    "classifier", "score", "qa_outputs", "classification_head", "sequence_summary", "logits_proj", "head", "cls",
    "cls_classifier", "distillation_classifier",
})  # fmt: skip


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report a method and a head that the configuration promises and the tensors do not have."""
    yield from _look_for_method(exam)
    yield from _look_for_head(exam)


def _look_for_head(exam: Examination) -> Iterator[Diagnosis]:
    task, mapping = exam.setting("task_type"), exam.setting("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    heads = TASK_HEADS.get(str(task), ())
    of_class = isinstance(model_class, str) and CLASSES.search(model_class)
    trained = exam.setting("modules_to_save")
    accepted = HEADS | {str(name) for name in trained} if isinstance(trained, list) else HEADS
    stored = [*exam.adapter, *(extra.module or key for key, extra in exam.adapter.extra.items())]
    if not (heads or of_class) or _has_part(stored, accepted):
        return
    fix = "take the head from a checkpoint of the training; without one, train again with the head in modules_to_save"
    if heads:
        # Even a base with a trained head does not help here: PEFT expects the head in the file of the adapter.
        evidence = f"task_type is {task}, and the file has neither {' nor '.join(heads)}, which PEFT needs to load it"
        yield Diagnosis("error", "head-missing", evidence, fix)
    elif not _has_part(exam.base_tensors, HEADS):
        evidence = f"base_model_class is {ascii(model_class)[:60]}, and the head of this class is not in the file"
        level: Level = "error" if exam.base_tensors else "warning"
        if level == "warning":
            evidence += f"; it is lost, unless {exam.adapter.base_model or 'the base'} has a trained one"
        yield Diagnosis(level, "head-missing", evidence + (" or the base" if exam.base_tensors else ""), fix)


def _has_part(names: Iterable[str], words: frozenset[str]) -> bool:
    """Whether a part of one of the names is one of the words."""
    return any(not words.isdisjoint(name.split(".")) for name in names)


def _look_for_method(exam: Examination) -> Iterator[Diagnosis]:
    """Report the method that most modules belong to, if the configuration names one that no module belongs to."""
    declared = exam.setting("peft_type")
    if exam.adapter.format != "peft" or not isinstance(declared, str):
        return
    methods: Counter[str] = Counter()
    for reading in exam.readings.values():
        origin = reading.module.origin
        keys = " ".join(origin.tensors) if origin else ""
        methods.update([method for part, method in TELLING.items() if part in keys][:1])
    # A file may hold modules of several methods. The configuration is wrong only if it names none of them.
    if not methods or declared.upper() in methods:
        return
    ((method, count),) = methods.most_common(1)
    evidence = f"it says {declared[:40]}, and {share(count, len(exam.readings))} are stored as {method}"
    fix = f'set "peft_type": "{method}" in adapter_config.json, if these tensors are the ones that were trained'
    yield Diagnosis("error", "peft-type", evidence, fix)
