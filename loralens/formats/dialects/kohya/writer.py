"""Writing kohya's dialect: unchanged modules as they were read, others under names that kohya's software reads."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.image_names import in_pipeline, is_of_diffusers_transformer
from loralens.core.lazy import LazyArray
from loralens.core.structured import Update
from loralens.errors import MismatchError, place
from loralens.formats.dialects import alpha, up_down
from loralens.formats.dialects.extras import add_tensors, check_encoder, keep_extras, translate_extras
from loralens.formats.dialects.image import kohya_names
from loralens.formats.dialects.kohya.reader import NAME, PREFIXES, kohya_scaling, parse_kohya_key, undouble_prefix
from loralens.formats.dialects.pairs import stored_parts
from loralens.formats.files.container import Stored

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
DORA = ("magnitude", "magnitude_in")  # roles of extras that are a dora_scale
Components = tuple[tuple[str, str], ...]
HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of the tensors, so they are wrong after a change


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

    def new(name: str) -> str:
        return file_names.get(name) or _file(name, components)

    files = up_down.names_in_file(adapter, NAME, leaf=parse_kohya_key, canonical=undouble_prefix, new=new)
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_tensors(files[name], module))
    add_tensors(tensors, _extras(adapter, files, new))
    config = adapter.config if adapter.format == NAME else None
    names = up_down.changed_names(files, undouble_prefix)
    return Stored(dict(sorted(tensors.items())), _metadata(adapter), config, names=names)


def _file(name: str, components: Components) -> str:
    """The name in the file for a module of another dialect."""
    if name.startswith(PREFIXES):
        return name
    check_encoder(name)
    # ComfyUI reads some of these names under OneTrainer's lora_transformer_, and sd-scripts reads none.
    if is_of_diffusers_transformer(name):
        raise MismatchError(
            "kohya's software has the names of the original checkpoint for the layers of a transformer, and what this "
            "layer is called there is known of FLUX.1 only",
            fix="write diffusers' or ComfyUI's format",
        )
    name = in_pipeline(name)
    # Names without a component are those of a UNet or DiT, which most kohya files are for.
    start, prefix = next(((s, p) for s, p in components if name.startswith(s)), ("", "lora_unet_"))
    return prefix + name[len(start) :].replace(".", "_")


def _is_as_read(module: Update) -> bool:
    """Whether the stored tensors still describe the module, including its scale."""
    return up_down.has_stored_scale(module, stored_parts(module, NAME, parse_kohya_key), kohya_scaling)


def _tensors(file: str, module: Update) -> Mapping[str, LazyArray]:
    if module.origin and _is_as_read(module):
        return module.origin.tensors
    parts = stored_parts(module, NAME, parse_kohya_key)
    return up_down.pair_tensors(file, module, parts, _alpha(module), title="kohya's software adapts")


def _alpha(module: Update) -> np.float32:
    """The α of a module in the file.

    For a scale of 0 it is r, because kohya's software reads an α of 0 as r; lora_up is zero then.
    """
    return alpha.alpha_for_file(module) if module.scale else np.float32(module.rank)


def _extras(adapter: Adapter, files: Mapping[str, str], new: Callable[[str], str]) -> dict[str, LazyArray]:
    """The extras: unchanged in kohya's own dialect; from other dialects, DoRA magnitudes."""

    def translate(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
        # These shapes broadcast over the weight.
        axes = (channels, 1) if extra.role == "magnitude" else (1, channels)
        return f"{files[extra.module]}.dora_scale", extra.tensor.reshape(*axes, *(1 for _ in module.layout.kernel))

    own: dict[str, LazyArray] = {}
    if adapter.format == NAME:
        # Magnitudes of layers that were joined into one matrix have no key of this dialect yet.
        joined = {key: e for key, e in adapter.extra.items() if e.role in DORA and not parse_kohya_key(key)}
        as_stored = replace(adapter, extra={key: e for key, e in adapter.extra.items() if key not in joined})
        own = keep_extras(as_stored, files, leaf=parse_kohya_key, canonical=undouble_prefix, named=new)
        adapter = replace(adapter, extra=joined)
    add_tensors(own, translate_extras(adapter, DORA, "a kohya file", translate))
    return own


def _metadata(adapter: Adapter) -> Mapping[str, str] | None:
    """The metadata of the header; after a change with the new rank and α, and without the hashes of the old tensors."""
    modules = adapter.modules.values()
    if adapter.format == NAME and all(map(_is_as_read, modules)):
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
    return {key: summary.get(key, text) for key, text in adapter.metadata.items() if key not in HASHES}


def _common_value(values: Iterable[str]) -> str:
    """The value that all share, or "Dynamic", which sd-scripts writes for several values."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
