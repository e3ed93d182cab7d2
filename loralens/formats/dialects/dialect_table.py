"""The table of the dialects: their names, the modules that read and write them, and the files that they become."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.model_in_memory import ModelPath
from loralens.formats.files.container import PEFT, Files, Stored


@final
@dataclass(frozen=True, slots=True)
class Format:
    """A dialect of adapter files; the module of its name reads and writes it.

    The modules are imported when they are needed: most adapters are PEFT's, and loading one should not take the time
    that importing all other dialects takes.

    Attributes
    ----------
    title : str
        The name of the dialect in messages.
    files : Files or None
        The files that the writer's result goes to; None for a dialect that is only read.
    nearest : str
        For a dialect that is only read: the dialect that takes its place in a new file.
    silent : bool
        The dialect stores no scale, so every file gets the record of `loralens.formats.dialects.conversion_record`.
    renames : bool
        The dialect has names of its own for models of Hugging Face, and its reader takes the base.
    """

    name: str
    title: str
    files: Files | None = None
    silent: bool = False
    nearest: str = ""
    renames: bool = False

    def _module(self, part: str) -> Any:
        # PEFT has a package; each other dialect is a single module.
        return import_module(f"{__package__}.{self.name}" + (f".{part}" if self.name == "peft" else ""))

    @property
    def writer(self) -> bool:
        """Whether the dialect can be written."""
        return self.files is not None

    def detect(self, stored: Stored) -> bool:
        """Whether the content of a file is of this dialect."""
        return bool(self._module("reader").detect(stored))

    def read(self, stored: Stored, base: ModelPath | None = None) -> Adapter:
        """Read the adapter from a file of this dialect, with the names of its ``base``."""
        adapter: Adapter = self._module("reader").read(stored, *([base] if self.renames else []))
        return adapter

    @property
    def write(self) -> Callable[..., Stored]:
        """The function that turns an adapter into the tensors, metadata and configuration of a file."""
        write: Callable[..., Stored] = self._module("writer").write
        return write


# A loralib file is a plain state dict, so most have no configuration beside them.
LORALIB = Files("lora.bin", "adapter_config.json", optional=True)
GGUF = "gguf"

# `detect_format` asks PEFT first and alone. The order of the other dialects does not matter to `detect_format`: their
# keys tell them apart, and a file that two of them claim is refused. Help texts and messages list the formats in the
# order of this table.
FORMATS: tuple[Format, ...] = (
    Format("peft", "Hugging Face PEFT", PEFT),
    Format("gguf", "GGUF adapter (llama.cpp)", Files("adapter.gguf")),
    Format("mlx", "mlx-lm", Files("adapters.safetensors", "adapter_config.json")),
    Format("lycoris", "LyCORIS", nearest="kohya"),
    Format("kohya", "kohya, sd-scripts, musubi", Files("lora.safetensors")),
    Format("diffusers", "diffusers", Files("pytorch_lora_weights.safetensors")),
    Format("comfyui", "ComfyUI", Files("lora.safetensors")),
    Format("xlabs", "XLabs FLUX", nearest="kohya"),
    Format("torchtune", "torchtune", nearest="peft", renames=True),
    Format("litgpt", "litgpt", nearest="peft", renames=True),
    Format("loralib", "microsoft/loralib", LORALIB, silent=True),
    Format("safeloras", "cloneofsimo safeloras", nearest="kohya"),
    Format("plain", "plain w_a_/w_b_ pairs (SAM-LoRA)", nearest="peft"),
)
