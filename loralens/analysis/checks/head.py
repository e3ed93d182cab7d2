"""A head that the task needs, and that is in neither the file nor the base."""

import re
from collections.abc import Iterable, Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.core.carried import TASK_HEADS

CODES = {
    "head-missing": "The task needs a head that a pretrained base does not have, and the file does not have it either. "
    "PEFT refuses to load such a file, or predicts with a head of random numbers.",
}
# Classes of transformers with a head that pretraining does not train.
CLASSES = re.compile(r"For(\w*Classification|QuestionAnswering|MultipleChoice)(WithTeacher)?$")
# What models of transformers call these heads.
HEADS = frozenset({
    "classifier", "score", "qa_outputs", "classification_head", "sequence_summary", "logits_proj", "head", "cls",
    "cls_classifier", "distillation_classifier",
})  # fmt: skip
FIX = "take the head from a checkpoint of the training; without one, train again with the head in modules_to_save"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report a head that the task or the class needs: an error if it is certain that the base does not have it."""
    task, mapping, trained = (exam.setting(key) for key in ("task_type", "auto_mapping", "modules_to_save"))
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    needed = TASK_HEADS.get(str(task), ())
    if not needed and not (isinstance(model_class, str) and CLASSES.search(model_class)):
        return
    heads = HEADS.union(map(str, trained)) if isinstance(trained, list) else HEADS
    if _has_part([*exam.adapter, *(extra.module or key for key, extra in exam.adapter.extra.items())], heads):
        return
    if needed:
        # PEFT expects the head in the file, even if that of the base is trained.
        evidence = f"task_type is {task}, and the file has neither {' nor '.join(needed)}, which PEFT needs to load it"
        if len(needed) == 1:
            evidence = f"task_type is {task}, and the file has no {needed[0]}, which PEFT needs to load it"
        yield Diagnosis("error", "head-missing", evidence, FIX)
        return
    evidence = f"base_model_class is {ascii(model_class)[:60]}, and the file has no head of this class"
    if not exam.base_tensors:
        evidence += f": it is lost, unless {exam.adapter.base_model or 'the base'} has a trained one"
        yield Diagnosis("warning", "head-missing", evidence, FIX)
    elif not _has_part(exam.base_tensors, heads):
        yield Diagnosis("error", "head-missing", f"{evidence}, and neither has the base", FIX)


def _has_part(names: Iterable[str], words: frozenset[str]) -> bool:
    """Whether a part of one of the names is one of the words."""
    return any(not words.isdisjoint(name.split(".")) for name in names)
