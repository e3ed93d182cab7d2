"""What the programs that people load this kind of adapter with would refuse, or leave out without a message."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination
from loralens.analysis.clients.rules import check
from loralens.choices import Consumer, Level

CODE = "client"
CODES = {
    CODE: "A program that commonly loads adapters of this dialect refuses this one, or leaves out a part of it. This "
    "is an error if all of these programs do, else a note."
}
OTHERS = ("head-missing",)  # codes of errors of programs that a check of the same code reports
# The programs that read a dialect as it is. That other programs need another dialect is no fault of an adapter.
COMMON: dict[str, tuple[Consumer, ...]] = {
    "peft": ("peft",),
    "gguf": ("llama.cpp",),
    "kohya": ("comfyui", "sd-scripts"),
    "lycoris": ("comfyui",),
    "comfyui": ("comfyui",),
}


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report one error of each program, unless the reader or another check reports it."""
    adapter = exam.adapter
    clients = COMMON.get(adapter.format, ())
    # vLLM serves language models only.
    if adapter.format == "peft" and exam.setting("task_type") == "CAUSAL_LM":
        clients += ("vllm",)
    # Of a file without its configuration the reader says that α is unknown.
    if adapter.format == "peft" and adapter.config is None:
        return
    errors = {client: [one for one in check(adapter, client) if one.level == "error"] for client in clients}
    level: Level = "error" if all(errors.values()) else "note"
    said = {finding.text for finding in adapter.findings}
    for client, found in errors.items():
        new = [one for one in found if one.text not in said and one.code not in OTHERS]
        if new:
            more = f", and {len(new) - 1} more (loralens inspect --for {client})" if len(new) > 1 else ""
            fix = new[0].fix.replace("convert …", f"convert {exam.quoted} -o {exam.sibling(client)}")
            yield Diagnosis(level, CODE, f"{client}: {new[0].text}{more}", fix)
