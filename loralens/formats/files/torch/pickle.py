"""Reading the state dict in a ``.bin``, ``.pt``, ``.pth`` or ``.ckpt`` file of torch without running any code in it.

A pickle is a program. ``torch.load`` and ``pickle.load`` run it, so such a file can do whatever the user who loads it
may do. This reader gives the following guarantees:

- **Nothing in the file is run.** The module `unpickler` interprets 31 harmless opcodes. A name in the file is compared
  with a literal table and never imported. Neither torch nor the module ``pickle`` is used.
- **No number in the file is trusted.** Lengths, memo numbers, storage sizes, offsets, shapes and strides are checked
  against the size of the file. No array is larger than the file, and no pickle is larger than 16 MiB.
- **The containers** (the modules `zip` and `legacy`) hold plain bytes at fixed places. Compressed zip entries are
  refused.
- **The values of the tensors are not checked.** torch's own checksums are optional, and a weight with a flipped bit is
  still a weight.

The result is tensors and plain values; anything else raises a FormatError that names it.
"""

from pathlib import Path
from typing import Any, TypeAlias

from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, place
from loralens.formats.files.container import OpenFile
from loralens.formats.files.torch import legacy as torch_legacy
from loralens.formats.files.torch import zip as torch_zip
from loralens.formats.files.torch.tensor import Storages, TorchTensor

Plain: TypeAlias = bool | int | float | str | None
_ONLY_TENSORS = "load it with torch where nothing can be harmed and save only the state dict of the adapter"


def read_pickle(path: Path) -> tuple[dict[str, LazyArray], dict[str, Plain | list[Plain]]]:
    """Read the tensors of a torch pickle, and the plain values beside them.

    A file that holds its tensors one level down, such as ``{"state_dict": {...}, "epoch": 3}``, is unwrapped: the plain
    values of both levels are returned together. The device that a tensor was saved on does not matter.

    Parameters
    ----------
    path : Path

    Returns
    -------
    tensors : dict of LazyArray
        In the order of the file; each is read from the file when it is needed.
    plain_values : dict
        Numbers, strings, booleans, None, and lists of those (a tuple or torch.Size becomes a list).

    Raises
    ------
    FormatError
        The file is damaged, or would run code, or holds something else.
    """
    with place(path):
        if not path.is_file():
            raise FormatError("no such file", fix="give the path of a .bin, .pt, .pth or .ckpt file")
        file = OpenFile(path)
        is_zip = file.read(0, min(4, file.size)) == torch_zip.MAGIC
        state, spans = torch_zip.load_zip(file) if is_zip else torch_legacy.load_legacy(file)
        tensors, plain_values = _split(_unwrap(state))
        storages = Storages(file, spans)
        arrays = {}
        for key, tensor in tensors.items():
            with place(key):
                arrays[key] = storages.array(tensor)
        return arrays, plain_values


def _unwrap(state: object) -> dict[str, Any]:
    """``state`` itself, or the one dict in it that holds tensors, together with the plain values around it."""
    if not isinstance(state, dict):
        raise FormatError(f"it holds a {_kind(state)}, not a state dict", fix=_ONLY_TENSORS)
    inner = [key for key, value in state.items() if isinstance(value, dict) and _has_tensors(value)]
    # Tensors at the top decide, because a state dict may hold other dicts as values.
    if _has_tensors(state) or not inner:
        return state
    # The same key could occur in two of them.
    if len(inner) > 1:
        what = f"it holds more than one state dict: {inner[0]}, {inner[1]}"
        raise FormatError(what, fix="save the one you want alone")
    around = {key: value for key, value in state.items() if key != inner[0]}
    # One of the two values would be lost.
    if twice := around.keys() & state[inner[0]].keys():
        raise FormatError(f"it holds {min(twice)} inside and beside {inner[0]}", fix=_ONLY_TENSORS)
    return {**around, **state[inner[0]]}


def _has_tensors(state: dict[str, Any]) -> bool:
    return any(isinstance(value, TorchTensor) for value in state.values())


def _split(state: dict[str, Any]) -> tuple[dict[str, TorchTensor], dict[str, Plain | list[Plain]]]:
    tensors = {key: value for key, value in state.items() if isinstance(value, TorchTensor)}
    plain_values: dict[str, Plain | list[Plain]] = {}
    for key, value in state.items():
        if isinstance(value, list | tuple):
            plain_values[key] = [_plain_value(key, item) for item in value]
        elif key not in tensors:
            plain_values[key] = _plain_value(key, value)
    return tensors, plain_values


def _plain_value(key: str, value: object) -> Plain:
    if value is None or isinstance(value, int | float | str):
        return value
    what = f"{key} holds a {_kind(value)}: neither a tensor nor a plain value"
    raise FormatError(what, fix=_ONLY_TENSORS)


def _kind(value: object) -> str:
    """The type of a value in messages: users know a TorchTensor as a Tensor."""
    return type(value).__name__.removeprefix("Torch")
