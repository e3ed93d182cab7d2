"""Naming and dividing the layers of image and video models as kohya's software, diffusers and ComfyUI have them.

diffusers has q, k and v of FLUX as layers of their own, and the other two keep them in one matrix. Dividing a pair is
exact: all parts share A, and each has its rows of B, without the columns that are zero in them. Joining pairs is exact
too: the factors form blocks, so the rank is the sum of their ranks, unless they share A.

The names and shapes of the modules show the architecture (`loralens.core.image_models`), so no base is needed.
Adapters of other models stay as they are.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.base_model import image_models_of
from loralens.core.image_families import Client, names_mapped
from loralens.core.image_models import ImageModel, Layer, is_text_encoder
from loralens.core.image_names import file_name
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank, Scaling
from loralens.core.structured import Update
from loralens.core.weights import with_kernels
from loralens.errors import FormatError, MismatchError, place

BY_ROW = ("magnitude", "lora_bias")  # roles of extras with one number for each output
Layers = tuple[Layer, ...]


def model_of(adapter: Adapter) -> ImageModel | None:
    """The architecture of an adapter, if all its modules are layers of a known one; the likeliest of those."""
    return next(iter(image_models_of(adapter)), None)


def kohya_names(adapter: Adapter) -> Mapping[str, str]:
    """Module → its name in a file of kohya; empty if the architecture is unknown."""
    model = model_of(adapter)
    if model is None:
        return {}
    return {name: model.kohya(model.find(name, module.shape)[0]) for name, module in adapter.items()}


def files_of_kohya(adapter: Adapter) -> dict[str, str]:
    """Module → its name in the kohya file that it was read from.

    Some converters double a prefix (``lora_unet_unet_``), call the first encoder of SDXL ``lora_te_``, or give SDXL and
    FLUX the names of diffusers. sd-scripts and ComfyUI skip such names without an error.
    """
    stored = {name: list(module.origin.tensors) for name, module in adapter.items() if module.origin}
    # Neither program reads a key with an underscore in place of the dot before lora_up. The name of such a module is
    # its whole key, because the whole key is wrong.
    return {name: file_name(keys) or keys[0] for name, keys in stored.items()}


# dialect → the client whose rules decide whether its names are loaded, and what messages call the client
CLIENTS: dict[str, tuple[Client, str]] = {
    "diffusers": ("diffusers", "diffusers"),
    "comfyui": ("comfyui", "ComfyUI"),
    "kohya": ("comfyui", "ComfyUI"),
}


def unmapped_names(dialect: str, adapter: Adapter, keys: Iterable[str]) -> list[str]:
    """The names of modules in a file that its client is not known to load.

    ``adapter`` is what the file was made from, and ``keys`` are its tensors. Names of text encoders are those of SD 3,
    which has the encoders of SDXL and FLUX.1.
    """
    model = model_of(adapter)
    if model and not model.family:
        return []
    names = sorted({name for key in keys if (name := file_name([key])) and not is_text_encoder(name)})
    if model is None:
        return names
    mapped = names_mapped(CLIENTS[dialect][0], model.family, names)
    return [name for name in names if not mapped[name]]


def fit_image(dialect: str, adapter: Adapter, model: ImageModel | None = None) -> Adapter:
    """An adapter of another dialect with the layers of image models named and divided as in ``dialect``.

    The dialect is ``kohya``, whose writer gives the names, ``diffusers`` or ``comfyui``. The model is the likeliest,
    unless it is given.

    Raises
    ------
    MismatchError
        Layers of one matrix have to be joined but are not pairs, or an extra cannot be divided or joined with them.
    """
    model = model or model_of(adapter)
    if model is None:
        return adapter
    layers = {name: model.find(name, module.shape) for name, module in adapter.items()}
    shapes = {name: found[0].shape for name, found in layers.items() if len(found) == 1}
    adapter = with_kernels(adapter, shapes)
    if dialect == "kohya":
        return _join_layers(adapter, layers, model)
    if dialect == "comfyui":
        # Layers that ComfyUI does not map by their names in diffusers become parts of their original matrices.
        original = {name: found for name, found in layers.items() if found[0].name in model.native_only}
        adapter = _join_layers(adapter, original, model)
        layers = {name: model.find(name, module.shape) for name, module in adapter.items()}
    # ComfyUI has the names of the original checkpoint, too, so there whole matrices stay whole.
    divided = _split_into_layers(adapter, layers) if dialect == "diffusers" else adapter
    names = {
        name: found[0].original
        if len(found) > 1 or (dialect == "comfyui" and found[0].name in model.native_only)
        else found[0].name
        for name, found in layers.items()
        if name in divided
    }
    # A layer whose halves have the other order in diffusers keeps the original order of rows until it is renamed.
    swapped = [
        name
        for name, new in names.items()
        if layers[name][0].swapped and model.is_original(name) != model.is_original(new)
    ]
    return _swap(divided, swapped).renamed({old: new for old, new in names.items() if old != new})


def _swap(adapter: Adapter, names: Iterable[str]) -> Adapter:
    """The adapter with the two halves of the rows of some modules exchanged."""
    modules, extra = dict(adapter.modules), dict(adapter.extra)
    for name in names:
        half = modules[name].shape[0] // 2
        parts = [slice(half, 2 * half), slice(half)]
        modules[name] = _rows(modules[name], parts)
        for key, extra_tensor in _extras_of(adapter, name):
            extra[key] = replace(extra_tensor, tensor=_take(extra_tensor.tensor, parts, 2 * half))
    return replace(adapter, modules=modules, extra=extra)


def _split_into_layers(adapter: Adapter, layers: Mapping[str, Layers]) -> Adapter:
    """The adapter with one module for each layer of diffusers that is adapted."""
    modules: dict[str, Update] = {}
    extra = dict(adapter.extra)
    for name, module in adapter.items():
        if len(layers[name]) == 1:
            modules[name] = module
            continue
        stops = accumulate((layer.shape[0] for layer in layers[name]), initial=0)
        parts = [slice(*ends) for ends in pairwise(stops)]
        with place(name):
            pieces = {layer.name: _rows(module, [part]) for layer, part in zip(layers[name], parts, strict=True)}
        with_extras = list(_extras_of(adapter, name))
        # In a joined matrix, layers that were not adapted are rows of zeros. A magnitude changes them nevertheless.
        adapted = {new: piece for new, piece in pieces.items() if piece.B.any()}
        modules |= pieces if with_extras else adapted or pieces
        for key, extra_tensor in with_extras:
            del extra[key]
            for layer, part in zip(layers[name], parts, strict=True):
                tensor = _take(extra_tensor.tensor, [part], layer.shape[0])
                new = f"{layer.name}.{extra_tensor.role}"
                extra[new] = replace(extra_tensor, module=layer.name, tensor=tensor)
    return replace(adapter, modules=modules, extra=extra)


def _rows(module: Update, parts: Sequence[slice]) -> LowRank:
    """The pair of some rows of a module, without the columns of B that are zero in all of them."""
    if not isinstance(module, LowRank):
        raise MismatchError("is not a pair, so its rows cannot be divided", fix="make it a pair first: --rank R")
    A, scaling = module.A, module.scaling
    rows = np.concatenate([module.B[part] for part in parts])
    used = np.flatnonzero(rows.any(axis=0))
    # A pair has at least one column, also if its update is zero.
    used = used if len(used) else np.arange(1)
    if len(used) < len(A):
        rows, A = rows[:, used], A[used]
        scaling = scaling if scaling.alpha is None else Scaling(origin=scaling.origin)
    return LowRank(rows, A, module.scale, scaling=scaling, layout=module.layout)


def _join_layers(adapter: Adapter, layers: Mapping[str, Layers], model: ImageModel) -> Adapter:
    """The adapter with the layers of one matrix as one module, under the name of the original checkpoint.

    Modules that ``layers`` does not list stay as they are.
    """
    groups: dict[str, list[str]] = {}
    for name, own_layers in layers.items():
        groups.setdefault(own_layers[0].original, []).append(name)
    modules = {name: module for name, module in adapter.items() if name not in layers}
    extra = dict(adapter.extra)
    swapped: dict[str, str] = {}
    for original, names in groups.items():
        members = model.by_original[original]
        # A matrix that is one layer, or that the adapter has as a whole.
        if len(layers[names[0]]) == len(members):
            modules[names[0]] = adapter[names[0]]
            if members[0].swapped and not model.is_original(names[0]):
                swapped[names[0]] = original
            continue
        updates = {layers[name][0].name: adapter[name] for name in names}
        with place(names[0]):
            modules[original] = _join([(layer.shape, updates.get(layer.name)) for layer in members])
            joined = _join_extras({layers[name][0].name: dict(_extras_of(adapter, name)) for name in names}, members)
        extra = {key: item for key, item in extra.items() if item.module not in names}
        extra |= {f"{original}.{role}": Extra(role, original, tensor) for role, tensor in joined.items()}
    # The name says in which order the halves are.
    return _swap(replace(adapter, modules=modules, extra=extra), swapped).renamed(swapped)


def _join(parts: Sequence[tuple[tuple[int, ...], Update | None]]) -> LowRank:
    """One pair made of pairs whose rows lie below each other. Rows without a pair are zero."""
    pairs = [module for _, module in parts if isinstance(module, LowRank)]
    if len(pairs) < sum(module is not None for _, module in parts):
        what = "is not a pair, so it cannot be joined with its neighbours"
        raise MismatchError(what, fix="make it a pair first: --rank R")
    scale = next((pair.scale for pair in pairs if pair.scale), 0.0)
    B, A = [pair.B for pair in pairs], [pair.A for pair in pairs]
    # Where the scales differ, B is multiplied by their ratio and rounded to float32. This rounding is below the
    # precision with which an α can state a scale.
    if any(pair.scale not in (scale, 0.0) for pair in pairs):
        ratios = [pair.scale / scale for pair in pairs]
        B = [(rows.astype(np.float64) * ratio).astype(np.float32) for rows, ratio in zip(B, ratios, strict=True)]
    elif any(pair.scale != scale for pair in pairs):
        B = [rows if pair.scale else np.zeros_like(rows) for rows, pair in zip(B, pairs, strict=True)]
    shared = all(np.array_equal(A[0], other) and other.dtype == A[0].dtype for other in A[1:])
    joined_A = A[0] if shared else np.concatenate(_of_one_dtype(A))
    joined_B = np.zeros((sum(shape[0] for shape, _ in parts), len(joined_A)), _of_one_dtype(B)[0].dtype)
    below, row, column = iter(B), 0, 0
    for shape, module in parts:
        if module is not None:
            rows = next(below)
            joined_B[row : row + len(rows), column : column + rows.shape[1]] = rows
            column += 0 if shared else rows.shape[1]
        row += shape[0]
    first = pairs[0].scaling
    scaling = first if shared and pairs[0].scale == scale else Scaling(origin=first.origin)
    return LowRank(joined_B, joined_A, scale, scaling=scaling)


def _of_one_dtype(arrays: list[Array]) -> list[Array]:
    """The arrays, in float32 if their dtypes differ."""
    return arrays if len({each.dtype for each in arrays}) == 1 else [each.astype(np.float32) for each in arrays]


def _extras_of(adapter: Adapter, name: str) -> Iterator[tuple[str, Extra]]:
    """The extras of a module whose rows are changed.

    Raises
    ------
    MismatchError
        One of them does not have one number for each row.
    """
    rows = adapter[name].shape[0]
    for key, extra in adapter.extra.items():
        if extra.module != name:
            continue
        if extra.role not in BY_ROW or extra.tensor.size != rows:
            raise MismatchError(
                f"{key} ({extra.role}) does not have one number for each of the {rows} rows, which have to be divided",
                fix="leave it out with --drop-extra, or merge the adapter into its base",
            )
        yield key, extra


def _take(tensor: LazyArray, parts: Sequence[slice], size: int) -> LazyArray:
    """``size`` numbers of a tensor with one number for each row."""
    flat = tensor.reshape(tensor.size)
    return flat.map(lambda numbers: np.concatenate([numbers[part] for part in parts]), shape=(size,))


def _join_extras(extras_of_layers: Mapping[str, Mapping[str, Extra]], members: Layers) -> dict[str, LazyArray]:
    """Role → the numbers of all rows of a matrix. A bias is zero where a layer has none."""
    numbers = {
        (layer, extra.role): extra.tensor.read().reshape(-1)
        for layer, extras in extras_of_layers.items()
        for extra in extras.values()
    }
    joined = {}
    for role in {role for _, role in numbers}:
        missing = [layer.name for layer in members if (layer.name, role) not in numbers]
        if missing and role == "magnitude":
            raise FormatError(
                f"{missing[0]} has no DoRA magnitude, but shares a matrix with layers that have one",
                fix="leave the magnitudes out with --drop-extra, or merge the adapter into its base",
            )
        rows = [numbers.get((layer.name, role), np.zeros(layer.shape[0], np.float32)) for layer in members]
        joined[role] = LazyArray.of(np.concatenate(rows))
    return joined
