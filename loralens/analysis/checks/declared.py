"""A ``peft_type`` in the configuration that the tensors contradict."""

from collections import Counter
from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination

CODES = {
    "peft-type": "adapter_config.json names another method than the one whose tensors are in the file: PEFT builds "
    "that method's layers, and finds none or only some of their tensors."
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


def look(exam: Examination) -> Iterator[Diagnosis]:
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
