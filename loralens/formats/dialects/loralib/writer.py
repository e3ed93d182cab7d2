"""Writing loralib: a state dict without the scale, which stays in the user's code and in loralens' record."""

from collections.abc import Mapping

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, ShapeError, place
from loralens.formats.dialects.extras import add_tensors, translatable_extras
from loralens.formats.dialects.loralib.reader import ENABLED, NAME
from loralens.formats.files.container import Stored

KINDS = ("linear", "embedding", "merged")  # a merged pair of another dialect is written as a wider linear one


def write(adapter: Adapter) -> Stored:
    """The adapter as loralib's layers store it.

    The scale of a module is not written, as loralib stores none, and it is not folded into the factors. The code that
    makes the layers must give ``lora_alpha`` = scale · r.

    Raises
    ------
    FormatError
        The file could not tell a kind of weight from another, or cannot hold an extra.
    ShapeError, MismatchError
        A changed module does not fit into the layer that it came from, or an update is not a pair.
    """
    tensors: dict[str, LazyArray] = {}
    for name, module in adapter.items():
        with place(name):
            tensors.update(_tensors(name, module, adapter))
    # Base weights and heads that were in the file go with it again.
    if adapter.format == NAME:
        tensors.update({key: extra.tensor for key, extra in adapter.extra.items()})
        return Stored(tensors, adapter.metadata, adapter.config)
    for extra in translatable_extras(adapter, ("bias",), "loralib").values():
        add_tensors(tensors, {f"{extra.module}.bias": extra.tensor})
    return Stored(dict(sorted(tensors.items())))


def _tensors(name: str, module: Update, adapter: Adapter) -> Mapping[str, LazyArray]:
    if module.origin and module.origin.format == NAME:
        return module.origin.tensors
    B, A = module.factors
    kind = module.layout.kind
    # Only a file that had the weight of the convolution can be read back.
    if kind == "conv" and adapter.format == NAME:
        B, A = _conv(module)
    # The leaves are the same for every kind of layer.
    elif kind not in KINDS:
        what = f"a loralib file does not say what a {kind} weight is, so it would be read as linear"
        raise FormatError(what, fix=f"choose another format; or {LEAVE_OUT}")
    if kind == "merged" and adapter.format == NAME and sum((adapter.config or {}).get(ENABLED, [])) == 1:
        what = "a changed update of one slice of a fused weight would be read as an update of the whole weight"
        raise ShapeError(what, fix="convert it to PEFT first")
    return {f"{name}.lora_A": A, f"{name}.lora_B": B}


def _conv(module: Update) -> tuple[LazyArray, LazyArray]:
    """The factors of a Conv2d as loralib stores them: B (out·k, k·r), A (k·r, in·k) from B (out, r), A (r, in·k²).

    The product is exactly the same: row o·k+a of B·A is part a of row o of ΔW.
    """
    B, A = module.factors
    (out, rank), k = B.shape, module.layout.kernel[0]
    wide = B.map(lambda array: np.kron(array, np.eye(k, dtype=array.dtype)), shape=(out * k, rank * k))
    return wide, A.reshape(rank * k, A.shape[1] // k)
