"""Reading ComfyUI's generic names: ``diffusion_model.X.lora_up.weight``, ``lora_down.weight`` and ``alpha``.

``X`` is the path in the checkpoint that ComfyUI loads; text encoders are under ``text_encoders.``. Trainers write the
same names with ``lora_A.weight`` and ``lora_B.weight`` (ai-toolkit, diffusion-pipe) or without ``.weight`` (Mochi),
and those of the families in `loralens.core.image_families` also without a prefix.
ComfyUI also reads the names of diffusers: ``transformer.X``, ``text_encoder.X``, and ``unet.X`` with ``.processor``
before the projections of an attention (``unet.….attn1.processor.to_out``), which the reader removes.

The scale is α/r, and 1 if a module has no α. Other tensors of a module:

==================  =============================================================  ===============================
leaf                what ComfyUI does with it                                      role here
==================  =============================================================  ===============================
``diff``            adds it to the weight                                          ``diff``
``diff_b``          adds it to the bias                                            ``diff_b``
``set_weight``      replaces the weight by it                                      ``saved``
``reshape_weight``  pads the weight with zeros to this shape before the update     ``shape``
``dora_scale``      W' = scale/‖W‖ · (W+ΔW) by output, scale/‖W+ΔW‖ by input       ``magnitude``, ``magnitude_in``
``magnitude``       ignores it (ai-toolkit's DoRA, one number per output)          ``magnitude``
==================  =============================================================  ===============================
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.image_names import are_of_joint_transformer, comfyui_has, comfyui_unet, in_pipeline
from loralens.core.lazy import LazyArray
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, MismatchError
from loralens.formats.dialects import kohya, pairs
from loralens.formats.dialects.diffusers import KEY, LYCORIS
from loralens.formats.dialects.pairs import (
    Leaf,
    UpDown,
    alpha_findings,
    alpha_for_file,
    check_encoder,
    dora_scale,
    match_leaf,
    scale_tensor,
    stored_scaling,
)
from loralens.formats.files.container import Stored

NAME = "comfyui"
# leaf → role, as in the table above; the role of a dora_scale depends on its axis.
ROLES = {"diff": "diff", "diff_b": "diff_b", "set_weight": "saved", "reshape_weight": "shape", "magnitude": "magnitude"}
KOHYA = ("lora_", "lycoris_")  # prefixes of kohya's dialect, whose names have underscores for dots

_OWN = ("diffusion_model.", "text_encoders.")
# x.lora_up.weight, and x.lora.up.weight of diffusers' older files.
_UP_DOWN = re.compile(r"^(?P<name>.+)\.lora[_.](?P<part>up|down)\.weight$")
# x.lora_A.weight, x.lora_A.ADAPTER.weight, and x.lora_A without an ending (Mochi).
_A_B = re.compile(r"^(?P<name>.+)\.lora_(?P<part>[AB])(?:(?:\.(?!weight$|bias$)[^.]+)?\.weight)?$")
_BARE = re.compile(
    r"^(?!transformer\.|unet\.|diffusion_model\.|text_encoder|lora_|base_model\.).+\.lora_[AB]\..*weight$"
)
_OTHER = re.compile(rf"^(?P<name>.+)\.(?P<part>alpha|dora_scale|{'|'.join(ROLES)})$")
# role, code and text of the notes about extras, in the order in which they are shown
_NOTICES = (
    ("diff", "full-difference", "weights have a full difference (.diff), which is kept and not measured"),
    ("diff_b", "bias-difference", "biases have a difference (.diff_b), which is kept and not measured"),
    ("saved", "set-weight", "weights are replaced (.set_weight): they are kept and not measured"),
    ("shape", "reshape-weight", "weights are padded with zeros to a new shape (.reshape_weight) before the update"),
    ("magnitude", "use-dora", "modules are DoRA: magnitudes are kept, and what is measured is ΔW = scale·B·A alone"),
    (
        "magnitude_in",
        "use-dora",
        "modules are DoRA by input: magnitudes are kept, and what is measured is ΔW = scale·B·A",
    ),
    ("other", "tensor-unread", "tensors belong to no pair and are kept unchanged"),
)


def parse_comfyui_key(key: str) -> Leaf | None:
    """The name in the file and the part of a key; None for a key that ComfyUI does not know."""
    return match_leaf(key, _UP_DOWN, _A_B, _OTHER)


def comfyui_leaf(key: str) -> Leaf | None:
    """The canonical name and the part of a key; None for a key that ComfyUI does not know."""
    parts = parse_comfyui_key(key)
    return parts and Leaf(remove_processor(parts.name), parts.part)


def remove_processor(name: str) -> str:
    """A name of diffusers without the ``.processor`` that ComfyUI expects before attention projections."""
    if not name.startswith("unet."):
        return name
    ended = f"{name}.0" if name.endswith(".processor.to_out") else name
    return ended.replace(".processor.to_", ".to_")


def detect(stored: Stored) -> bool:
    """Whether a file is ComfyUI's: ``lora_down`` under dotted names, or ``lora_A`` under its own prefixes."""
    # Files of LyCORIS may have these names too, and a file with the metadata of diffusers is one of diffusers.
    keys = stored.tensors
    if KEY in (stored.metadata or {}) or any(LYCORIS.search(key) for key in keys):
        return False
    halves = {key: leaf.name for key in keys if (leaf := match_leaf(key, _UP_DOWN, _A_B))}
    # Some trainers write no prefix. Norms beside such pairs are those of a control LoRA of FLUX, which is no update.
    if halves.keys() == keys.keys() and all(map(_BARE.search, keys)):
        from loralens.core.image_families import families_of

        return bool(families_of(set(halves.values())))
    plain = {key for key in halves if key.endswith((".lora_down.weight", ".lora_up.weight"))}
    return bool(halves) and all(
        "." in name and not name.startswith(KOHYA) if key in plain else key.startswith(_OWN)
        for key, name in halves.items()
    )


def read(stored: Stored) -> Adapter:
    """The adapter of a file with ComfyUI's names.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or an α is not a number.
    """
    modules, extra = pairs.gather(
        stored.tensors,
        comfyui_leaf,
        update=lambda _, parts: pairs.read_pair(parts, NAME, stored_scaling) if parts.keys() & {"A", "B"} else None,
        companions=partial(kohya.kohya_extras, roles=ROLES),
    )
    findings = alpha_findings(modules, stored.metadata) + _about_extras(extra, modules)
    return pairs.make_adapter(stored, NAME, modules, extra, findings)


def _about_extras(extra: Mapping[str, Extra], modules: Mapping[str, Update]) -> list[Finding]:
    """Findings about tensors other than the pairs: what ComfyUI does with them, or that their meaning is unknown."""
    findings = []
    for role, code, text in _NOTICES:
        keys = [key for key, item in extra.items() if item.role == role]
        if keys:
            findings.append(Finding("note", code, f"{len(keys)} {text}: {', '.join(keys[:3])}"))
    both = [item.module for item in extra.values() if item.role in ("diff", "saved") and item.module in modules]
    if both:
        # ComfyUI keeps one patch for each key, and the difference or the new weight replaces the pair.
        text = f"{len(both)} modules (the first is {both[0]}) also have a pair, which ComfyUI then does not apply"
        findings.append(Finding("warning", "pair-ignored", text, "remove one of the two"))
    return findings


# Beginnings of names that ComfyUI maps to the weights of its own models.
KNOWN = ("diffusion_model.", "text_encoders.", "transformer.", "text_encoder.", "text_encoder_2.")
# where ComfyUI has the T5 encoder of every model
T5 = "text_encoders.t5xxl.transformer."
FLUX_T5 = "text_encoder_2.encoder.block."  # the second encoder of a pipeline is T5 in FLUX, and CLIP G elsewhere


def write(adapter: Adapter) -> Stored:
    """The adapter under ComfyUI's names. α is a float32 tensor without axes.

    Biases of B become ``diff_b``: Δbias = scale · bias. DoRA by output cannot be written from other dialects: there
    ComfyUI divides by ‖W‖, and other software by ‖W+ΔW‖.

    Raises
    ------
    FormatError, MismatchError, ShapeError
        A name has no dots or is unknown to ComfyUI, ComfyUI does not adapt a kind of weight, the file cannot hold an
        extra, float32 cannot hold a scale, or an update is not a pair.
    """
    joint, own = are_of_joint_transformer(adapter), adapter.format == NAME

    def translate(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
        if extra.role != "lora_bias":
            return "dora_scale", dora_scale(extra, module, channels)
        return "diff_b", scale_tensor(extra.tensor.reshape(channels), module.scale, dtype=np.dtype(np.float32))

    def named(name: str) -> str:
        return _file(name, joint=joint) if name in adapter else _comfyui_name(in_pipeline(name))

    writer = UpDown(NAME, parse_comfyui_key, remove_processor, stored_scaling, alpha_for_file, "ComfyUI adds to")
    stored = writer.write(adapter, named, ("lora_bias", "magnitude_in"), "a ComfyUI file", translate)
    return replace(
        stored, metadata=adapter.metadata if own else {"format": "pt"}, config=adapter.config if own else None
    )


def _file(name: str, *, joint: bool) -> str:
    """The name in the file for a module of another dialect."""
    # Dots cannot be restored without the names of the base.
    if name.startswith(KOHYA):
        raise MismatchError(
            "this is a name with underscores for dots, which ComfyUI knows in kohya's files only",
            fix="its layers are not those of a model in docs/formats.md, whose names are known: write kohya's format, "
            "or give --base so that the names become those of the base model",
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
