"""The kernels of convolutions whose factors a file stores flat, by the base or by the table of image models."""

import re
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.core.base_model import image_models_of
from loralens.core.lowrank import LowRank, Origin
from loralens.core.matching import Shape, match
from loralens.core.structured import Update
from loralens.core.weights import with_kernels
from loralens.errors import MismatchError

# The names of layers that read the input of a model.
_FIRST = re.compile(
    r"(^|[._])(conv_?(in|1|first|stem)|stem|patch_?embed\w*|embed\w*|input\w*|features\.0)([._]|$)", re.IGNORECASE
)
# The dialects in the origins of such modules.
FLAT = ("lycoris-product", "peft-adalora", "peft-loha", "peft-lokr")


def with_known_kernels(adapter: Adapter, base: str | PathLike[str] | None) -> Adapter:
    """The adapter with the kernels of its convolutions, as far as they are known.

    The shape of a weight does not say whether the convolution has groups. It probably has if no other tensor of the
    base has as many rows as the weight reads channels, and it is not the first layer. A pair cannot be the update of
    such a weight, so the number of groups becomes 0, with which writers refuse it.
    """
    flat = {name: module for name, module in adapter.items() if module.origin and module.origin.format in FLAT}
    if not flat:
        return adapter
    known = _shapes_in_table(adapter) if base is None else {}
    grouped: list[str] = []
    if base is not None:
        from loralens.formats.models.checkpoint import shapes  # reading a base takes 6 ms to import

        stored = shapes(Path(base))
        try:
            keys = match({name: module.shape for name, module in flat.items()}, stored, allow_missing=True).keys
        except MismatchError:  # of another model, which the verb says
            return adapter
        known = {name: stored[key] for name, key in keys.items()}
        grouped = [name for name, key in keys.items() if _may_be_grouped(key, stored)]
    modules: dict[str, Update] = dict(with_kernels(adapter, known).modules)
    for name in grouped:
        modules[name] = modules[name].with_layout(replace(modules[name].layout, groups=0))
    # Nothing writes these dialects, so the tensors that were read stay, for what is said about the file.
    kept = {name: _with_origin(module, adapter[name].origin) for name, module in modules.items()}
    return replace(adapter, modules=kept)


def _shapes_in_table(adapter: Adapter) -> Mapping[str, Shape]:
    """Module → shape of its weight, if the adapter is of one image model of the table."""
    models = image_models_of(adapter) if adapter.format == "peft" else []
    if len(models) != 1:
        return {}
    return {name: models[0].find(name, module.shape)[0].shape for name, module in adapter.items()}


def _may_be_grouped(key: str, stored: Mapping[str, Shape]) -> bool:
    """Whether a weight of the base is one of a convolution that probably has groups."""
    out, *inside = stored[key]
    if len(inside) < 2 or out % inside[0] or out == inside[0]:
        return False
    others = [shape for other, shape in stored.items() if other != key]
    # Of the input's channels there is no other convolution, while groups come in many blocks.
    is_first = _FIRST.search(key) and not any(len(shape) > 2 and shape[1] == inside[0] for shape in others)
    return not (is_first or any(shape[:1] == (inside[0],) for shape in others))


def _with_origin(module: Update, origin: Origin | None) -> Update:
    if not isinstance(module, LowRank):
        return replace(module, origin=origin)
    B, A = module.factors
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout, origin=origin)
