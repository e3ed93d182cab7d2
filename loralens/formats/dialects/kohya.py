"""Reading kohya's dialect: ``<name>.lora_down.weight``, ``.lora_up.weight``, ``.alpha`` (sd-scripts, musubi-tuner).

A name is a prefix for the component and the path of the module, with underscores for dots::

    lora_unet_      the UNet or DiT of every model       lora_te_     the only text encoder
    lora_te1_ …2_   CLIP L and G                         lora_te3_    T5
    lora_transformer_, lora_prior_unet_, lora_prior_te_, lycoris_   prefixes of other trainers

Underscores cannot be turned back into dots without the base model, so the names stay as they are in the file. Two
spellings that occur in files are read as the usual ones, and written back as they were: a doubled prefix
(``lora_unet_unet_``), and an underscore in place of the dot before ``lora_down``, ``lora_up`` and ``alpha``.

The scale is α/r, where r is the number of rows of lora_down, and 1 if there is no α. In sd-scripts and LyCORIS, α = 0
means α = r. Fused projections that were trained separately (``split_qkv``) are stored as one pair with a block-diagonal
lora_up, and are one module here. sd-scripts keeps their α though the rows are 3 or 4 times r, so every program, also
sd-scripts, applies a smaller scale than in training. A ``dora_scale`` is on the output axis, (out, 1…), or on the input
axis, (1, in…).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from types import MappingProxyType

import numpy as np

from loralens.choices import Level
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.image_names import in_pipeline, is_of_diffusers_transformer
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.core.structured import Update
from loralens.errors import MismatchError, ShapeError
from loralens.formats.dialects import pairs
from loralens.formats.dialects.image import kohya_names
from loralens.formats.dialects.pairs import (
    DORA,
    SAVE_AGAIN,
    STORED,
    WRITE_ALPHA,
    Leaf,
    Parts,
    UpDown,
    alpha_for_file,
    check_encoder,
    dora_scale,
    match_leaf,
    single_number,
)
from loralens.formats.files.container import Stored
from loralens.formats.files.json_text import plain_text

NAME = "kohya"
# The beginnings of all prefixes in the table above.
PREFIXES = ("lora_", "lycoris_")

# The leaf follows a dot, or in some files an underscore.
_HALF = re.compile(r"^(?P<name>.+)[._]lora_(?P<part>up|down)\.weight$")
_OTHER = re.compile(r"^(?P<name>.+)\.(?P<part>alpha|dora_scale)$")
_DOUBLED = "lora_unet_unet_"
# Leaves of LyCORIS: a file with one of them is read by that dialect, which has kohya's pairs too.
_LYCORIS = re.compile(
    r"\.(hada_.+|lokr_.+|oft_blocks|on_input|lambda_layer|[ab][12]\.weight|diff|diff_b|[wb]_norm|bias_(indices|values))$"
    r"|[._]lora_mid\.weight$"
)


def parse_kohya_key(key: str) -> Leaf | None:
    """The name in the file and the part of a key; None for a key that kohya's software does not write."""
    return match_leaf(key, _HALF, _OTHER)


def kohya_leaf(key: str) -> Leaf | None:
    """The name and the part of a key, where a doubled prefix is removed from the name."""
    parts = parse_kohya_key(key)
    return parts and Leaf(undouble_prefix(parts.name), parts.part)


def undouble_prefix(name: str) -> str:
    """A name in which the prefix, which some converters write twice, occurs once."""
    return f"lora_unet_{name.removeprefix(_DOUBLED)}" if name.startswith(_DOUBLED) else name


def detect(stored: Stored) -> bool:
    """Whether a file is kohya's: it has pairs under kohya's prefixes, and no leaf that only LyCORIS writes."""
    names = [leaf.name for leaf in map(parse_kohya_key, stored.tensors) if leaf and leaf.part in "AB"]
    lycoris = any(_LYCORIS.search(key) for key in stored.tensors)
    return bool(names) and all(name.startswith(PREFIXES) for name in names) and not lycoris


def read(stored: Stored) -> Adapter:
    """The adapter of a kohya file.

    Raises
    ------
    FormatError, ShapeError
        One half of a pair is missing, factors do not fit together, or an α is not a number.
    """
    modules, extra = pairs.gather(
        stored.tensors,
        kohya_leaf,
        update=lambda _, parts: pairs.read_pair(parts, NAME, kohya_scaling) if parts.keys() & {"A", "B"} else None,
        companions=kohya_extras,
    )
    findings = about_scales(modules) + about_extras(extra)
    return pairs.make_adapter(stored, NAME, modules, extra, findings, base_model=base_model(stored))


def kohya_scaling(parts: Parts, rank: int) -> Scaling:
    """α/r by the alpha of a module; 1 if it has none or if it is 0."""
    alpha = single_number(*parts["alpha"]) if "alpha" in parts else None
    if alpha:
        return Scaling("alpha/r", alpha, rank, "alpha in the file")
    return Scaling("alpha/r", rank, rank, f"{'no alpha' if alpha is None else 'alpha 0'} in the file: α = r")


def kohya_extras(
    name: str,
    parts: Parts,
    module: Update | None,
    used: Iterable[str] = STORED,
    roles: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Extra]:
    """The extras of a module, or of a name that has no update; ``roles`` are those of some parts."""
    extra = {}
    for part, (key, tensor) in parts.items():
        if module is None or part not in used:
            # Without an update there are no axes to compare the shape of a dora_scale with.
            dora = module if part == "dora_scale" else None
            role = magnitude_role(tensor, dora) if dora else roles.get(part, "other")
            extra[key] = Extra(role, name, tensor, "bias" if part == "diff_b" else "weight")
    return extra


def magnitude_role(tensor: LazyArray, module: Update) -> str:
    """The role of a dora_scale, by its axis: one number for each output, (out, 1…), or for each input, (1, in…)."""
    (out, in_), kernel = module.shape, prod(module.layout.kernel)
    if tensor.size == out and tensor.shape[:1] == (out,):
        return "magnitude"
    flattened = tensor.ndim > 2 and tensor.size and in_ % tensor.size == 0  # LyCORIS stores some kernels flat
    if tensor.ndim > 1 and tensor.shape[0] == 1 and (tensor.size * kernel == in_ or flattened):
        return "magnitude_in"
    raise ShapeError(f"dora_scale {tensor.shape} fits neither side of an update {module.shape}", fix=SAVE_AGAIN)


def base_model(stored: Stored) -> str | None:
    """The model that the adapter was trained on, by the metadata."""
    metadata = stored.metadata or {}
    return plain_text(metadata.get("ss_sd_model_name")) or plain_text(metadata.get("ss_base_model_version"))


def about_scales(modules: Mapping[str, Update]) -> list[Finding]:
    """Findings about scales that are not α/r of the file."""
    origins = {name: module.scaling.origin for name, module in modules.items()}
    # The origin of a scale says why it is what it is, so the findings need no second look at the file.
    missing = [name for name, origin in origins.items() if origin.startswith("no alpha")]
    zero = [name for name, origin in origins.items() if origin.startswith("alpha 0")]
    findings = []
    if missing:
        # If only some modules lack an α, something may be missing.
        level: Level = "note" if len(missing) == len(modules) else "warning"
        text = f"{len(missing)} of {len(modules)} modules have no alpha (the first is {missing[0]}): α = r, so scale 1"
        findings.append(Finding(level, "alpha-missing", text, WRITE_ALPHA if level == "warning" else ""))
    if zero:
        text = f"{len(zero)} modules have alpha 0 (the first is {zero[0]}): sd-scripts and LyCORIS use α = r, ComfyUI 0"
        findings.append(Finding("warning", "alpha-zero", text, "write α = r, or leave the modules out"))
    return findings


def about_extras(extra: Mapping[str, Extra]) -> list[Finding]:
    """Findings about DoRA, and about tensors of unknown meaning."""
    findings = []
    roles = [item.role for item in extra.values() if item.role.startswith("magnitude")]
    if roles:
        text = f"{len(roles)} modules are DoRA: magnitudes are kept, and ΔW = scale·B·A is that of the pairs alone"
        # Programs agree about magnitudes by input; by output they divide by different norms.
        fix = "ComfyUI divides by ‖W‖, LyCORIS and PEFT by ‖W + ΔW‖" if "magnitude" in roles else ""
        findings.append(Finding("note", "dora", text, fix))
    other = [key for key, item in extra.items() if item.role == "other"]
    if other:
        text = f"{len(other)} tensors belong to no update known here and are kept unchanged: {', '.join(other[:3])}"
        findings.append(Finding("note", "tensor-unread", text))
    return findings


# The beginning of a name in a pipeline → the prefix in the file; the first that fits is used. T5 is the third encoder
# for kohya's software, also where it is the second one of the pipeline (FLUX).
COMPONENTS = (
    ("unet.", "lora_unet_"),
    ("transformer.", "lora_transformer_"),
    ("diffusion_model.", "lora_unet_"),
    ("text_encoder_2.encoder.block.", "lora_te3_encoder_block_"),
    ("text_encoder_3.", "lora_te3_"),
    ("text_encoder_2.", "lora_te2_"),
)
NUMBERED = ("text_encoder_2.", "text_encoder_3.", "transformer.")  # with these, the first encoder is lora_te1_


def write(adapter: Adapter) -> Stored:
    """The adapter as kohya's software stores it.

    Names get a prefix, and their dots become underscores; SDXL and FLUX get the names of their original checkpoints,
    which sd-scripts has. A module that was read from a kohya file keeps its keys, and its tensors if nothing changed.
    The layers of CLIP are under ``text_model``, where kohya's software and ComfyUI look for them, whatever their names
    are in transformers. α is a float32. There is no α that means a scale of 0; for such a module, lora_up is zero.

    Raises
    ------
    FormatError
        Two modules would get one name, the name of a layer does not say which text encoder it belongs to, kohya's
        software does not adapt a kind of weight, the file cannot hold an extra, or float32 cannot hold a scale.
    ShapeError, MismatchError
        A grouped convolution was changed, an update is not a pair, or the name of a layer of a transformer in the
        original checkpoint is not known.
    """
    file_names = kohya_names(adapter) if adapter.format != NAME else {}
    # If the model is unknown, the prefix of the first text encoder depends on the other modules.
    numbered = any(in_pipeline(name).startswith(NUMBERED) for name in adapter)
    components = (*COMPONENTS, ("text_encoder.", "lora_te1_" if numbered else "lora_te_"))

    def translate(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
        return "dora_scale", dora_scale(extra, module, channels)

    def named(name: str) -> str:
        return file_names.get(name) or _file(name, components)

    stored = WRITER.write(adapter, named, DORA, "a kohya file", translate)
    return replace(stored, metadata=_metadata(adapter), config=adapter.config if adapter.format == NAME else None)


def _file(name: str, components: Iterable[tuple[str, str]]) -> str:
    """The name in the file for a module of another dialect."""
    if name.startswith(PREFIXES):
        return name
    check_encoder(name)
    # ComfyUI reads some of these names under OneTrainer's lora_transformer_, and sd-scripts reads none.
    if is_of_diffusers_transformer(name):
        raise MismatchError(
            "kohya's software has the names of the original checkpoint for the layers of a transformer, and this layer "
            "has the names and shapes of no model of which loralens knows them",
            fix="write diffusers' format; if the model is one of docs/formats.md, name it in "
            "base_model_name_or_path of adapter_config.json",
        )
    name = in_pipeline(name)
    # Names without a component are those of a UNet or DiT, which most kohya files are for.
    start, prefix = next(((s, p) for s, p in components if name.startswith(s)), ("", "lora_unet_"))
    return prefix + name[len(start) :].replace(".", "_")


def _alpha(module: Update) -> np.float32:
    """The α of a module in the file.

    For a scale of 0 it is r, because kohya's software reads an α of 0 as r; lora_up is zero then.
    """
    return alpha_for_file(module) if module.scale else np.float32(module.rank)


WRITER = UpDown(NAME, parse_kohya_key, undouble_prefix, kohya_scaling, _alpha, "kohya's software adapts")


def _metadata(adapter: Adapter) -> Mapping[str, str] | None:
    """The metadata of the header; after a change with the new rank and α."""
    modules = adapter.modules.values()
    if adapter.format == NAME and all(map(WRITER.is_as_read, modules)):
        return adapter.metadata
    alphas = {float(_alpha(module)) for module in modules}
    summary = {
        "ss_network_dim": _common_value(str(module.rank) for module in modules),
        "ss_network_alpha": _common_value(str(int(number) if number.is_integer() else number) for number in alphas),
    }
    if adapter.format != NAME:
        return {"ss_network_module": "networks.lora", **summary}
    # A kohya file without metadata stays without them.
    if adapter.metadata is None:
        return None
    return {key: summary.get(key, text) for key, text in adapter.metadata.items()}


def _common_value(values: Iterable[str]) -> str:
    """The value that all share, or "Dynamic", which sd-scripts writes for several values."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
