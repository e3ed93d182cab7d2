"""What the writers of kohya and ComfyUI share: lora_up, lora_down and α under one name for each module."""

from collections.abc import Callable, Mapping

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.core.structured import Update
from loralens.errors import LEAVE_OUT, FormatError, place
from loralens.formats.dialects.pairs import Leaf, Parts, pack_pair, stored_parts

KINDS = ("linear", "conv", "merged")  # the kinds of weights that both programs adapt


def names_in_file(
    adapter: Adapter,
    form: str,
    *,
    leaf: Callable[[str], Leaf | None],
    canonical: Callable[[str], str],
    new: Callable[[str], str],
) -> dict[str, str]:
    """The name of each module in a file of the dialect ``form``: its old one if it was read from such a file.

    Parameters
    ----------
    adapter : Adapter
    form : str
    leaf : callable
        Splits a key into the name in the file and the part.
    canonical : callable
        Maps a name in the file to the name that the reader gives.
    new : callable
        Gives the name in the file for a module of another dialect, or refuses it.

    Raises
    ------
    FormatError
        Two modules would be read under one name.
    """
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name, module in adapter.items():
        with place(name):
            parts = stored_parts(module, form, leaf)
            stored_leaf = leaf(parts["A"][0]) if parts else None
            files[name] = stored_leaf.name if stored_leaf else new(name)
            # Dots and underscores may become the same, or several spellings may stand for one layer of a pipeline.
            owner = owners.setdefault(canonical(files[name]), name)
            if owner != name:
                what = f"{owner} would be called {canonical(files[name])} too"
                raise FormatError(what, fix=LEAVE_OUT)
    return files


def has_stored_scale(module: Update, parts: Parts, scaling: Callable[[Parts, int], Scaling]) -> bool:
    """Whether a module was read from these parts, and their α still gives its scale."""
    return bool(parts) and scaling(parts, module.rank).value == module.scale


def pair_tensors(file: str, module: Update, parts: Parts, alpha: np.float32, *, title: str) -> dict[str, LazyArray]:
    """The three tensors of a module under the name ``file``. Halves that are only rescaled stay as they were stored.

    Raises
    ------
    FormatError
        The programs do not adapt this kind of weight. ``title`` is the beginning of the message.
    """
    if module.layout.kind not in KINDS:
        what = f"{title} linear layers and convolutions, but this is of kind {module.layout.kind!r}"
        raise FormatError(what, fix=LEAVE_OUT)
    B, A = (parts["B"][1], parts["A"][1]) if parts else pack_pair(module)
    # There is no α that means a scale of 0 in kohya's software, so lora_up is written as zeros.
    if module.scale == 0 and alpha:
        B = B.map(np.zeros_like, shape=B.shape)
    keys = {"A": f"{file}.lora_down.weight", "B": f"{file}.lora_up.weight", "alpha": f"{file}.alpha"}
    keys |= {part: key for part, (key, _) in parts.items()}
    return {keys["B"]: B, keys["A"]: A, keys["alpha"]: LazyArray.of(np.array(alpha))}


def changed_names(files: Mapping[str, str], canonical: Callable[[str], str]) -> dict[str, str]:
    """The names that the reader will give to modules → their names here, where they differ."""
    return {canonical(file): name for name, file in files.items() if canonical(file) != name}
