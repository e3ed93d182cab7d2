"""Fields of a configuration that make other software import a module; loralens imports none of them.

PEFT's ``AutoPeftModel`` imports ``auto_mapping.parent_library``, and its LoRA layers import ``megatron_core`` where a
``megatron_config`` is there (peft 0.21, ``auto.py`` and ``tuners/lora/model.py``); ``auto_map`` is what transformers
runs with ``trust_remote_code``. Importing a module runs it.
"""

from collections.abc import Iterator
from typing import Any

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination

CODES = {
    "foreign-code": "The configuration names code that other software imports, and so runs, when it loads the adapter."
}
# Top-level packages that the field's own tools write into ``parent_library``.
KNOWN = frozenset({"transformers", "diffusers", "peft", "torch", "sentence_transformers", "timm"})
MEGATRON = "megatron.core"  # PEFT's default
FIX = "load it only if you trust whose code that is, or take this field out of adapter_config.json"


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every field that names code from outside the known libraries."""
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
