"""The table of the dialects: their names, the modules that read and write them, and the files that they become."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypedDict, final

from loralens.core.adapter import Adapter
from loralens.formats.files.container import PEFT, Files, Stored


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A dialect of adapter files and the modules that read and write it.

    The modules are imported when they are needed: most adapters are PEFT's, and loading one should not take the time
    that importing all other dialects takes.

    Attributes
    ----------
    title : str
        The name of the dialect in messages.
    module : str
        The module that has ``detect`` and ``read``.
    writer : str
        The module that has ``write``; empty for a dialect that is only read.
    files : Files or None
        The files that the writer's result goes to.
    silent : bool
        The dialect stores no scale, so every file gets the record of `loralens.formats.dialects.record`.
    """

    name: str
    title: str
    module: str
    writer: str = ""
    files: Files | None = None
    silent: bool = False

    def detect(self, stored: Stored) -> bool:
        """Whether the content of a file is of this dialect."""
        return bool(import_module(self.module).detect(stored))

    def read(self, stored: Stored) -> Adapter:
        """Read the adapter from a file of this dialect."""
        # Modules are loaded by name, so the type of the result is not known to a type checker.
        adapter = import_module(self.module).read(stored)
        assert isinstance(adapter, Adapter)
        return adapter

    @property
    def write(self) -> Callable[..., Stored]:
        """The function that turns an adapter into the tensors, metadata and configuration of a file."""
        write: Callable[..., Stored] = import_module(self.writer).write
        return write


def _dialect(name: str, title: str, *, files: Files | None = None, silent: bool = False) -> Format:
    """A dialect whose room has its name. One that can be written is a package with the modules reader and writer."""
    room = f"loralens.formats.dialects.{name}"
    if files is None:
        return Format(name, title, room)
    return Format(name, title, f"{room}.reader", f"{room}.writer", files, silent)


# A loralib file is a plain state dict, so most have no configuration beside them.
LORALIB = Files("lora.bin", "adapter_config.json", optional=True)
GGUF = "gguf"

# `detect_format` asks PEFT first and alone. The order of the other dialects does not matter to `detect_format`: their
# keys tell them apart, and a file that two of them claim is refused. Help texts and messages list the formats in the
# order of this table.
FORMATS: tuple[Format, ...] = (
    _dialect("peft", "Hugging Face PEFT", files=PEFT),
    _dialect("gguf", "GGUF adapter (llama.cpp)", files=Files("adapter.gguf")),
    _dialect("mlx", "mlx-lm", files=Files("adapters.safetensors", "adapter_config.json")),
    _dialect("lycoris", "LyCORIS"),
    _dialect("kohya", "kohya, sd-scripts, musubi", files=Files("lora.safetensors")),
    _dialect("diffusers", "diffusers", files=Files("pytorch_lora_weights.safetensors")),
    _dialect("comfyui", "ComfyUI", files=Files("lora.safetensors")),
    _dialect("xlabs", "XLabs FLUX"),
    _dialect("torchtune", "torchtune"),
    _dialect("litgpt", "litgpt"),
    _dialect("loralib", "microsoft/loralib", files=LORALIB, silent=True),
    _dialect("safeloras", "cloneofsimo safeloras"),
    _dialect("plain", "plain w_a_/w_b_ pairs (SAM-LoRA)"),
)


class WriterOptions(TypedDict, total=False):
    """Options of writing that only some dialects have; `WRITTEN_WITH` says which."""

    arch: str | None  # llama.cpp's name of the architecture
    base_config: Mapping[str, Any] | None  # the content of the base model's config.json


WRITTEN_WITH = {"arch": ("gguf",), "base_config": ("gguf", "mlx")}  # option → its dialects
