"""Writing mlx-lm: unchanged modules as they were read, others transposed, and a configuration beside them.

mlx-lm has one rank and one scale for all modules. If a module has another scale than the most common one, its lora_b is
multiplied by the ratio. This is exact if the ratio is a power of two; otherwise it is rounded once to float32. Several
ranks are refused, because mlx-lm cannot load them.
"""

from collections.abc import Iterable, Mapping
from math import frexp
from typing import Any

import ml_dtypes
import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import LazyArray
from loralens.core.names import block
from loralens.core.structured import Update
from loralens.core.together import NORMS
from loralens.errors import LEAVE_OUT, FormatError, ShapeError, place
from loralens.formats.dialects.extras import check_all_dora, translate_extras
from loralens.formats.dialects.mlx.reader import NAME, is_mlx_config, lora_parameters, stated_scale
from loralens.formats.dialects.pairs import scale_tensor
from loralens.formats.dialects.peft.fields import carried_fields
from loralens.formats.dialects.stacks import (
    Stacks,
    check_complete,
    group_by_pair,
    is_as_read,
    most_common,
    stack_matrices,
)
from loralens.formats.files.container import Stored

# the kinds of weights that mlx-lm can adapt
KINDS = ("linear", "embedding", "experts", "merged")
# dtypes whose range of exponents is large enough for a power of two to be multiplied in exactly; float16's is not.
_WIDE = (np.dtype(np.float64), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
# kind of layout → the role of a magnitude along the rows of the stored weight
_MAGNITUDES = {"linear": "magnitude", "merged": "magnitude", "embedding": "magnitude_in"}


def write(adapter: Adapter, *, base_config: Mapping[str, Any] | None = None) -> Stored:
    """The adapter as mlx-lm stores it.

    ``base_config``, the content of the base's config.json, is not used here: with its help
    `loralens.formats.dialects.experts` has already renamed the experts.

    Raises
    ------
    FormatError
        mlx-lm does not adapt a kind of weight, or cannot hold an extra, or only some modules are DoRA.
    ShapeError, MismatchError
        Modules have several ranks, experts are missing, or an update is not a pair.
    """
    # Every writer of mlx and GGUF takes this option; `fit_experts` has used it before this function is called.
    del base_config
    stacks = group_by_pair(adapter)
    # The scale is one for the whole file, so it is chosen before any module is written.
    config, scale = _config(adapter, stacks)
    tensors: dict[str, LazyArray] = {}
    for name, modules in stacks.items():
        with place(name):
            tensors.update(_tensors(name, modules, scale))
    tensors.update(_extras(adapter))
    if adapter.format == NAME:
        return Stored(tensors, adapter.metadata, config)
    return Stored(dict(sorted(tensors.items())), {"format": "mlx"}, config)


def _tensors(name: str, modules: Mapping[str, Update], scale: float) -> Mapping[str, LazyArray]:
    first = next(iter(modules.values()))
    ratio = _ratio(modules, scale)
    if is_as_read(modules.values(), NAME) and ratio == 1:
        assert first.origin
        return first.origin.tensors
    if first.layout.kind not in KINDS:
        raise FormatError(f"mlx-lm has no LoRA for a {first.layout.kind} weight", fix=LEAVE_OUT)
    if first.layout.kind == "experts":
        check_complete(modules, "mlx-lm")
        b, a = (stack_matrices([module.factors[side] for module in modules.values()]) for side in (0, 1))
    else:
        b, a = (factor.T for factor in first.factors)
    return {f"{name}.lora_a": a, f"{name}.lora_b": _times(b, ratio)}


def _ratio(modules: Mapping[str, Update], scale: float) -> float:
    """The factor for lora_b, if ``scale`` is that of the whole file."""
    scales = {module.scale for module in modules.values()}
    # All experts are in one tensor, which has one scale.
    if len(scales) > 1:
        raise ShapeError("the experts of this stack differ in scale, but mlx-lm holds one", fix="give them one scale")
    own = scales.pop()
    return 1.0 if own == scale else own / scale  # both may be 0


def _times(b: LazyArray, ratio: float) -> LazyArray:
    """``ratio`` · b in the dtype of b if that is exact; otherwise in float32, rounded once."""
    if ratio == 1:
        return b
    exact = abs(frexp(ratio)[0]) == 0.5 and b.dtype in _WIDE  # the mantissa of a power of two is 0.5
    return scale_tensor(b, ratio, dtype=b.dtype if exact else np.dtype(np.float32))


def _extras(adapter: Adapter) -> dict[str, LazyArray]:
    """The extras: unchanged in mlx-lm's own dialect; from other dialects, DoRA magnitudes as ``m``."""
    if adapter.format == NAME:
        return {key: extra.tensor for key, extra in adapter.extra.items() if extra.role not in NORMS}

    def translate(extra: Extra, module: Update, rows: int) -> tuple[str, LazyArray]:
        # A convolution, for example, has no DoRA in mlx-lm.
        if _MAGNITUDES.get(module.layout.kind) != extra.role:
            what = "mlx-lm keeps a DoRA magnitude for each row of a stored weight, but this one has another axis"
            raise FormatError(what, fix="convert with --drop-extra to leave it out")
        return f"{extra.module}.m", extra.tensor.reshape(rows)

    tensors = translate_extras(adapter, set(_MAGNITUDES.values()), "mlx-lm", translate)
    # mlx-lm makes either LoRA or DoRA layers, by one field of the configuration.
    check_all_dora(adapter, "mlx-lm")
    return tensors


def _config(adapter: Adapter, stacks: Stacks) -> tuple[Mapping[str, Any] | None, float]:
    """The configuration and its scale: the old one if it still describes the adapter, otherwise a new one.

    If the scale was unknown, the new configuration has none, and it stays unknown.
    """
    old = adapter.config if adapter.format == NAME else None
    modules = adapter.modules.values()
    stated = stated_scale(old)
    unsaid = stated is None and all(m.scaling.formula == "unknown" and m.scale == 1 for m in modules)
    unsaid = unsaid and adapter.format == NAME
    untouched = all(is_as_read(stack.values(), NAME) for stack in stacks.values())
    # Nothing that the old configuration says has changed.
    if untouched and unsaid:
        return old, 1.0
    if untouched and stated is not None and all(module.scale == stated for module in modules):
        return old, stated
    rank = _one_rank(modules)
    if unsaid:
        if old is not None and "rank" in lora_parameters(old):
            old = {**old, "lora_parameters": {**lora_parameters(old), "rank": rank}}
        return old, 1.0
    # A scale other than 0, because the other scales are divided by it.
    scale = most_common((module.scale for module in modules if module.scale), 1.0)
    # Other fields, such as the number of layers, are kept.
    base = dict(old) if old is not None and is_mlx_config(old) else _new_config(adapter, stacks)
    base["lora_parameters"] = {**lora_parameters(base), "rank": rank, "scale": scale}
    return base, scale


def _one_rank(modules: Iterable[Update]) -> int:
    """The rank of all modules; 8, mlx-lm's default, if there are no modules."""
    ranks = {module.rank for module in modules}
    if len(ranks) > 1:
        what = f"mlx-lm has one rank for all modules, and these have {', '.join(map(str, sorted(ranks)))}"
        raise ShapeError(what, fix="give them one rank: loralens compress --uniform")
    return max(ranks, default=8)


def _new_config(adapter: Adapter, stacks: Stacks) -> dict[str, Any]:
    """A configuration with which mlx-lm makes these modules.

    It may make more modules by the same keys. Their lora_b stays 0, so they change nothing.
    """
    dora = any(extra.role in _MAGNITUDES.values() for extra in adapter.extra.values())
    dropout = carried_fields(adapter).get("lora_dropout", 0.0)
    keys = sorted({_key(name) for name in stacks})
    return {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"rank": 8, "scale": 1.0, "dropout": dropout, "keys": keys},
        "model": adapter.base_model,
        "num_layers": -1,  # all
    }


def _key(name: str) -> str:
    """mlx-lm's key for a module: its path within its block, or its full path outside of blocks."""
    position = block(name)
    return name.removeprefix(f"{position.stack}.{position.number}.") if position else name
