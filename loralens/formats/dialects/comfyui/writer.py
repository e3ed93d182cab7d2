"""Writing ComfyUI's names: unchanged modules as they were read, others as ``lora_up``, ``lora_down`` and ``alpha``.

Names that ComfyUI knows are kept: those under ``diffusion_model.``, ``text_encoders.`` and the components of diffusers.
Names of a single component get the component before them. ``unet.`` names get the ``.processor`` that ComfyUI expects,
layers of CLIP get ``text_model.``, T5 gets its name in ComfyUI, and all other names get ``diffusion_model.`` before
them. Names that ComfyUI would ignore are refused.
"""

from collections.abc import Mapping
from math import prod

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.naming.image_names import comfyui_has, comfyui_unet, in_pipeline
from loralens.core.structured import Update
from loralens.errors import FormatError, MismatchError, place
from loralens.formats.dialects import alpha
from loralens.formats.dialects.comfyui.reader import KOHYA, NAME, parse_comfyui_key, remove_processor
from loralens.formats.dialects.extras import (
    add_tensors,
    check_encoder,
    check_size,
    keep_extras,
    owning_module,
    translatable_extras,
)
from loralens.formats.dialects.pairs import Parts, pack_pair, stored_parts
from loralens.formats.files.container import Stored

KINDS = ("linear", "conv", "merged")  # of weights that ComfyUI adds an update to
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
        A name has no dots or is unknown to ComfyUI, ComfyUI does not adapt weights of a kind, the file cannot hold an
        extra, float32 cannot hold a scale, or an update is no pair.
    """
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            files[name] = _file(name, stored_parts(module, NAME, parse_comfyui_key))
            # in_pipeline may map two names to one, such as a layer of CLIP with and without `text_model`.
            owner = owners.setdefault(files[name], name)
            if owner != name:
                raise FormatError(f"{owner} would be called {files[name]} too", fix="leave one of them out")
            tensors.update(_tensors(files[name], module))
    add_tensors(tensors, _extras(adapter, files))
    own = adapter.format == NAME
    return Stored(
        # sorted, so that the order of modules does not change the file
        dict(sorted(tensors.items())),
        adapter.metadata if own else {"format": "pt"},
        adapter.config if own else None,
        names={remove_processor(file): name for name, file in files.items() if remove_processor(file) != name},
    )


def _file(name: str, parts: Parts) -> str:
    """The name of a module in the file; its old one if it was read from such a file."""
    if parts:
        stored_leaf = parse_comfyui_key(parts["A"][0])
        assert stored_leaf
        return stored_leaf.name
    # Dots cannot be restored without the names of the base.
    if name.startswith(KOHYA):
        raise MismatchError(
            "this is a name with underscores for dots, which ComfyUI knows in kohya's files only",
            fix="write kohya's format, or give --base so that the names become those of the base model",
        )
    check_encoder(name)
    file = _comfyui_name(in_pipeline(name))
    # ComfyUI only logs keys that it does not know, so the update would be lost without an error.
    if not comfyui_has(file):
        raise FormatError(
            f"ComfyUI has no weight of the name {file}, and would ignore it",
            fix="leave this module out first: loralens drop",
        )
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
    if parts and module.origin and alpha.stored_scaling(parts, module.rank).value == module.scale:
        return module.origin.tensors
    if module.layout.kind not in KINDS:
        what = f"ComfyUI adds to linear layers and convolutions, and this is of kind {module.layout.kind!r}"
        raise FormatError(what, fix="leave this module out with --modules")
    alpha_tensor = {f"{file}.alpha": LazyArray.of(np.array(alpha.alpha_for_file(module)))}
    if parts:
        return dict((parts["A"], parts["B"])) | alpha_tensor
    B, A = pack_pair(module)
    return {f"{file}.lora_down.weight": A, f"{file}.lora_up.weight": B} | alpha_tensor


def _extras(adapter: Adapter, files: Mapping[str, str]) -> dict[str, LazyArray]:
    """The extras: unchanged in ComfyUI's own dialect; of others the bias of B, and magnitudes of DoRA by input.

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
    tensors: dict[str, LazyArray] = {}
    for key, extra in translatable_extras(adapter, ("lora_bias", "magnitude_in"), "a ComfyUI file").items():
        with place(key):
            module, file = owning_module(adapter, extra), files[extra.module]
            out, kernel = module.shape[0], module.layout.kernel
            # A magnitude by input has one number for each input channel, whatever the kernel is.
            channels = out if extra.role == "lora_bias" else module.shape[1] // prod(kernel)
            check_size(extra.tensor, channels)
            if extra.role == "lora_bias":
                add_tensors(tensors, {f"{file}.diff_b": _scale_tensor(extra.tensor.reshape(out), module.scale)})
            else:
                add_tensors(tensors, {f"{file}.dora_scale": extra.tensor.reshape(1, channels, *(1 for _ in kernel))})
    return tensors


def _scale_tensor(tensor: LazyArray, scale: float) -> LazyArray:
    """``scale`` times a tensor, float32."""
    return tensor.map(
        lambda array: (scale * array.astype(np.float64)).astype(np.float32), shape=tensor.shape, dtype=np.float32
    )
