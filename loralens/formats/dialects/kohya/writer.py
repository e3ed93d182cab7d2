"""Writing kohya's dialect: unchanged modules as they were read, others under names that kohya's software reads."""

from collections.abc import Iterable, Mapping
from math import prod

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.naming.image_names import in_pipeline
from loralens.core.structured import Update
from loralens.errors import FormatError, place
from loralens.formats.dialects import alpha
from loralens.formats.dialects.extras import (
    add_tensors,
    check_encoder,
    check_size,
    keep_extras,
    owning_module,
    translatable_extras,
)
from loralens.formats.dialects.kohya.reader import NAME, PREFIXES, kohya_scaling, parse_kohya_key, undouble_prefix
from loralens.formats.dialects.pairs import Parts, pack_pair, stored_parts
from loralens.formats.files.container import Stored

KINDS = ("linear", "conv", "merged")  # the kinds of weights that kohya's software adapts
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
Components = tuple[tuple[str, str], ...]
HASHES = ("sshs_model_hash", "sshs_legacy_hash")  # of the tensors, so they are wrong after a change


def write(adapter: Adapter) -> Stored:
    """The adapter as kohya's software stores it.

    Names get a prefix, and their dots become underscores. A module that was read from a kohya file keeps its keys, and
    its tensors if nothing changed. The layers of CLIP are under ``text_model``, where kohya's software and ComfyUI look
    for them, whatever their names are in transformers. α is a float32. No α stands for a scale of 0, so then lora_up is
    zero.

    Raises
    ------
    FormatError
        Two modules would get one name, the name of a layer does not say which text encoder it belongs to, kohya's
        software does not adapt a kind of weight, the file cannot hold an extra, or float32 cannot hold a scale.
    ShapeError, MismatchError
        A grouped convolution was changed, or an update is no pair.
    """
    components = _components(adapter)
    files = _files(adapter, components)
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_tensors(files[name], module))
    add_tensors(tensors, _extras(adapter, files, components))
    names = {undouble_prefix(file): name for name, file in files.items() if undouble_prefix(file) != name}
    config = adapter.config if adapter.format == NAME else None
    return Stored(dict(sorted(tensors.items())), _metadata(adapter), config, names=names)


def _components(adapter: Adapter) -> Components:
    """The prefixes for the components of a pipeline; that of the first text encoder depends on the other modules."""
    first = "lora_te1_" if any(in_pipeline(name).startswith(NUMBERED) for name in adapter) else "lora_te_"
    return (*COMPONENTS, ("text_encoder.", first))


def _files(adapter: Adapter, components: Components) -> dict[str, str]:
    """The name of each module in the file."""
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, module in adapter.items():
        with place(name):
            files[name] = _file(name, _parts(module), components)
        # Dots and underscores become the same, so two names may collide.
        owner = owners.setdefault(undouble_prefix(files[name]), name)
        if owner != name:
            what = f"{owner} and {name} would both be called {undouble_prefix(files[name])}"
            raise FormatError(what, fix="leave one of them out with --modules")
    return files


def _file(name: str, parts: Parts, components: Components) -> str:
    """The name of a module in the file; its old one if it was read from such a file."""
    if parts:
        stored_leaf = parse_kohya_key(parts["A"][0])
        assert stored_leaf
        return stored_leaf.name
    if name.startswith(PREFIXES):
        return name
    check_encoder(name)
    name = in_pipeline(name)
    # Names without a component are those of a UNet or DiT, which most kohya files are for.
    start, prefix = next(((s, p) for s, p in components if name.startswith(s)), ("", "lora_unet_"))
    return prefix + name[len(start) :].replace(".", "_")


def _parts(module: Update) -> Parts:
    """The parts of a module in the kohya file that it was read from; none if it was not read from one."""
    return stored_parts(module, NAME, parse_kohya_key)


def _is_as_read(module: Update) -> bool:
    """Whether the stored tensors still describe the module, including its scale."""
    parts = _parts(module)
    return bool(parts) and kohya_scaling(parts, module.rank).value == module.scale


def _tensors(file: str, module: Update) -> Mapping[str, LazyArray]:
    if _is_as_read(module):
        assert module.origin
        return module.origin.tensors
    if module.layout.kind not in KINDS:
        what = f"kohya's software adapts linear layers and convolutions, and this is of kind {module.layout.kind!r}"
        raise FormatError(what, fix="leave this module out with --modules")
    parts = _parts(module)
    # Only the scale of a module that still has its tensors has changed.
    B, A = (parts["B"][1], parts["A"][1]) if parts else pack_pair(module)
    # An α of 0 means α = r for kohya's software, so the scale of 0 goes into the factor.
    if module.scale == 0:
        B = B.map(np.zeros_like, shape=B.shape)
    keys = {"A": f"{file}.lora_down.weight", "B": f"{file}.lora_up.weight", "alpha": f"{file}.alpha"}
    keys |= {part: key for part, (key, _) in parts.items()}
    return {keys["B"]: B, keys["A"]: A, keys["alpha"]: LazyArray.of(np.array(_alpha(module)))}


def _alpha(module: Update) -> np.float32:
    """The α of a module in the file.

    For a scale of 0 it is r, because kohya's software reads an α of 0 as r; lora_up is zero then.
    """
    return alpha.alpha_for_file(module) if module.scale else np.float32(module.rank)


def _extras(adapter: Adapter, files: Mapping[str, str], components: Components) -> dict[str, LazyArray]:
    """The extras: unchanged in kohya's own dialect; of others the magnitudes of DoRA."""
    if adapter.format == NAME:
        return keep_extras(
            adapter,
            files,
            leaf=parse_kohya_key,
            canonical=undouble_prefix,
            named=lambda name: _file(name, {}, components),
        )
    tensors: dict[str, LazyArray] = {}
    for key, extra in translatable_extras(adapter, ("magnitude", "magnitude_in"), "a kohya file").items():
        with place(key):
            module, out = owning_module(adapter, extra), extra.role == "magnitude"
            channels = module.shape[0] if out else module.shape[1] // prod(module.layout.kernel)
            check_size(extra.tensor, channels)
            ones = (1 for _ in module.layout.kernel)
            # These shapes broadcast over the weight.
            shape = (channels, 1, *ones) if out else (1, channels, *ones)
            add_tensors(tensors, {f"{files[extra.module]}.dora_scale": extra.tensor.reshape(*shape)})
    return tensors


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
    # A kohya file without metadata stays one.
    if adapter.metadata is None:
        return None
    return {key: summary.get(key, text) for key, text in adapter.metadata.items() if key not in HASHES}


def _common_value(values: Iterable[str]) -> str:
    """The value that all share, or "Dynamic", which sd-scripts writes for several values."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else "Dynamic"
