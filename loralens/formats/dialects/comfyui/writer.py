"""Writing ComfyUI's names: unchanged modules as they were read, others as ``lora_up``, ``lora_down`` and ``alpha``.

Names that ComfyUI knows are kept: those under ``diffusion_model.``, ``text_encoders.`` and the components of diffusers.
Names of a single component get the component before them. ``unet.`` names get the ``.processor`` that ComfyUI expects,
layers of CLIP get ``text_model.``, T5 gets its name in ComfyUI, and all other names get ``diffusion_model.`` before
them. Names that ComfyUI would ignore are refused.
"""

from collections.abc import Mapping

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.image_names import are_of_joint_transformer, comfyui_has, comfyui_unet, in_pipeline
from loralens.core.lazy import LazyArray
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, place
from loralens.formats.dialects import alpha, up_down
from loralens.formats.dialects.comfyui.reader import KOHYA, NAME, parse_comfyui_key, remove_processor
from loralens.formats.dialects.extras import add_tensors, check_encoder, keep_extras, translate_extras
from loralens.formats.dialects.pairs import scale_tensor, stored_parts
from loralens.formats.files.container import Stored

# Beginnings of names that ComfyUI maps to the weights of its own models.
KNOWN = ("diffusion_model.", "text_encoders.", "transformer.", "text_encoder.", "text_encoder_2.")
# where ComfyUI has the T5 encoder of every model
T5 = "text_encoders.t5xxl.transformer."
FLUX_T5 = "text_encoder_2.encoder.block."  # the second encoder of a pipeline is T5 in FLUX, and CLIP G elsewhere


def write(adapter: Adapter) -> Stored:
    """The adapter under ComfyUI's names. α is a float32 tensor without axes.

    Raises
    ------
    FormatError, MismatchError, ShapeError
        A name has no dots or is unknown to ComfyUI, ComfyUI does not adapt a kind of weight, the file cannot hold an
        extra, float32 cannot hold a scale, or an update is not a pair.
    """
    joint = are_of_joint_transformer(adapter)
    files = up_down.names_in_file(
        adapter, NAME, leaf=parse_comfyui_key, canonical=remove_processor, new=lambda name: _file(name, joint=joint)
    )
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_tensors(files[name], module))
    add_tensors(tensors, _extras(adapter, files))
    metadata, config = (adapter.metadata, adapter.config) if adapter.format == NAME else ({"format": "pt"}, None)
    # Sorted, so that the order of modules does not change the file.
    return Stored(dict(sorted(tensors.items())), metadata, config, names=up_down.changed_names(files, remove_processor))


def _file(name: str, *, joint: bool) -> str:
    """The name in the file for a module of another dialect."""
    # Dots cannot be restored without the names of the base.
    if name.startswith(KOHYA):
        raise MismatchError(
            "this is a name with underscores for dots, which ComfyUI knows in kohya's files only",
            fix="its layers are not those of SD, SDXL or FLUX.1, whose names are known: write kohya's format, or give "
            "--base so that the names become those of the base model",
        )
    check_encoder(name)
    file = _comfyui_name(in_pipeline(name, transformer=joint))
    # ComfyUI only logs keys that it does not know, so the update would be lost without an error.
    if not comfyui_has(file):
        what = f"ComfyUI has no weight of the name {file}, and would ignore it"
        raise FormatError(what, fix=LEAVE_OUT)
    return file


def _comfyui_name(name: str) -> str:
    """ComfyUI's name for a module of a pipeline."""
    if name.startswith(("text_encoder_3.", FLUX_T5)):
        return T5 + name.partition(".")[2]
    if name.startswith("unet."):
        return f"unet.{comfyui_unet(name.removeprefix('unet.')) or name.removeprefix('unet.')}"
    return name if name.startswith(KNOWN) else f"diffusion_model.{name}"


def _tensors(file: str, module: Update) -> Mapping[str, LazyArray]:
    parts = stored_parts(module, NAME, parse_comfyui_key)
    # The stored tensors are only valid with the scale that their own alpha gives.
    if module.origin and up_down.has_stored_scale(module, parts, alpha.stored_scaling):
        return module.origin.tensors
    return up_down.pair_tensors(file, module, parts, alpha.alpha_for_file(module), title="ComfyUI adds to")


def _extras(adapter: Adapter, files: Mapping[str, str]) -> dict[str, LazyArray]:
    """The extras: unchanged in ComfyUI's own dialect; from other dialects, biases of B and DoRA magnitudes by input.

    Δbias = scale · bias is a ``diff_b``. DoRA by output cannot be written: there ComfyUI divides by ‖W‖, and other
    software by ‖W+ΔW‖.
    """
    if adapter.format == NAME:
        return keep_extras(
            adapter,
            files,
            leaf=parse_comfyui_key,
            canonical=remove_processor,
            named=lambda name: _comfyui_name(in_pipeline(name)),
        )

    def translate(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
        if extra.role == "lora_bias":
            bias = scale_tensor(extra.tensor.reshape(channels), module.scale, dtype=np.dtype(np.float32))
            return f"{files[extra.module]}.diff_b", bias
        shape = (1, channels, *(1 for _ in module.layout.kernel))
        return f"{files[extra.module]}.dora_scale", extra.tensor.reshape(*shape)

    return translate_extras(adapter, ("lora_bias", "magnitude_in"), "a ComfyUI file", translate)
