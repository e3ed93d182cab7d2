"""Checks for what other programs refuse, leave out or run when they load an adapter, and findings of our reader."""

import re
from collections.abc import Iterator
from typing import Any

from loralens.analysis.clients import WITH_PIPELINE, check, has_head, lost_heads
from loralens.analysis.diagnosis import Diagnosis, Examination
from loralens.choices import Consumer, Level
from loralens.core.base_model import image_models_of


def report_reader_findings(exam: Examination) -> Iterator[Diagnosis]:
    """Report the findings of the reader; a text that begins with the name of a module belongs to that module."""
    for finding in exam.adapter.findings:
        name, _, text = finding.text.partition(": ")
        about_module = text and name in exam.adapter
        evidence, module = (text, name) if about_module else (finding.text, None)
        yield Diagnosis(finding.level, finding.code, evidence, finding.fix, module)


def find_missing_head(exam: Examination) -> Iterator[Diagnosis]:
    """Report what PEFT misses: an error if it refuses the file, or if it is known that the base has no head."""
    for finding in lost_heads(exam.adapter):
        if finding.level == "error" or not exam.base_tensors:
            yield Diagnosis(finding.level, finding.code, finding.text, finding.fix)
        elif not has_head(exam.base_tensors):
            yield Diagnosis("error", finding.code, f"{finding.text}; this base has none", finding.fix)


CLIENT = "client"  # the code of these findings
OTHERS = ("head-missing",)  # codes of errors of programs that a check of the same code reports
# The programs that read a dialect as it is. That other programs need another dialect is no fault of an adapter.
COMMON: dict[str, tuple[Consumer, ...]] = {
    "peft": ("peft",),
    "gguf": ("llama.cpp",),
    "kohya": ("comfyui", "sd-scripts"),
    "lycoris": ("comfyui",),
    "comfyui": ("comfyui",),
}


CONVERT = re.compile(r"loralens convert …((?: --drop-extra| --(?:to|base|rank|alpha|prefix) [^\s;,)]+)*)")


def find_client_errors(exam: Examination) -> Iterator[Diagnosis]:
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
            # The layers of these models are known without the pipeline.
            fix = new[0].fix.replace(f" {WITH_PIPELINE}", "") if image_models_of(adapter) else new[0].fix
            if convert := CONVERT.search(fix):
                command = f"`loralens convert {exam.quoted} -o {exam.sibling(client)}{convert[1]}`"
                fix = fix[: convert.start()] + command + fix[convert.end() :]
            yield Diagnosis(level, CLIENT, f"{client}: {new[0].text}{more}", fix)


# Top-level packages that the field's own tools write into ``parent_library``.
KNOWN = frozenset({"transformers", "diffusers", "peft", "torch", "sentence_transformers", "timm"})
MEGATRON = "megatron.core"  # PEFT's default
FIX = "load it only if you trust whose code that is, or take this field out of adapter_config.json"


def find_foreign_code(exam: Examination) -> Iterator[Diagnosis]:
    """Report every field that names code from outside the known libraries; loralens imports none of it.

    PEFT's ``AutoPeftModel`` imports ``auto_mapping.parent_library``, and its LoRA layers import ``megatron_core`` where
    a ``megatron_config`` is there (peft 0.21, ``auto.py`` and ``tuners/lora/model.py``); ``auto_map`` is what
    transformers runs with ``trust_remote_code``. Importing a module runs it.
    """
    for field, name in _foreign_fields(exam):
        # In ASCII and cut off, because the name comes out of the file and is printed on a terminal.
        evidence = f"{field} is {ascii(name)[:80]}: loralens does not import it, and other software may"
        yield Diagnosis("warning", "foreign-code", evidence, FIX)


def _foreign_fields(exam: Examination) -> Iterator[tuple[str, Any]]:
    mapping = exam.setting("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    # A hostile file may have anything here, so a value that is not a name is reported too.
    if library is not None and not (isinstance(library, str) and library.partition(".")[0] in KNOWN):
        yield "auto_mapping.parent_library", library
    # PEFT imports megatron_core only if there is a configuration for it.
    core = exam.setting("megatron_core")
    if exam.setting("megatron_config") and core not in (None, MEGATRON):
        yield "megatron_core", core
    for field in ("auto_map", "custom_pipelines", "trust_remote_code"):
        if value := exam.setting(field):
            yield field, value
