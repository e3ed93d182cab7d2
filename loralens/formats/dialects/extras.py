"""What is not half of a pair, on its way into another dialect: translated, or refused by name."""

from collections.abc import Callable, Collection, Mapping

from loralens.core.adapter import Adapter, Extra
from loralens.core.carried import NORMS
from loralens.core.lazy import LazyArray
from loralens.core.names import some
from loralens.core.naming.image_names import lone_encoder
from loralens.core.structured import Update
from loralens.errors import FormatError, ShapeError
from loralens.formats.dialects.pairs import SAVE_AGAIN, Leaf


def to_translate(adapter: Adapter, roles: Collection[str], title: str) -> Mapping[str, Extra]:
    """The extras of an adapter from another dialect, all of roles that ``title`` can hold.

    Raises
    ------
    FormatError
        It has extras of other roles; they are named, and never dropped silently.
    """
    norms = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    if norms:
        raise FormatError(
            f"the magnitudes of {len(norms)} DoRA modules are not in the file, {norms[0]} the first, and {title} does "
            "not make them from the base",
            fix="give --base, and they are written as the lengths of its weights; or merge it into the base",
        )
    lost = [f"{key} ({extra.role})" for key, extra in adapter.extra.items() if extra.role not in roles]
    if lost:
        fix = "convert with --drop-extra to leave them out"
        if any(extra.role == "embedding" for extra in adapter.extra.values()):
            fix += "; --base leaves out embeddings that PEFT saved though they are the base's"
        raise FormatError(f"{title} has no place for {some(lost)}", fix=fix)
    return adapter.extra


def to_keep(
    adapter: Adapter,
    files: Mapping[str, str],
    *,
    leaf: Callable[[str], Leaf | None],
    canonical: Callable[[str], str],
    named: Callable[[str], str],
) -> dict[str, LazyArray]:
    """The extras of an adapter that is written in its own dialect, each beside its module, whatever that is called now.

    While no module is new a key stays as it is, and afterwards while it says what the file calls the module; else that
    takes the place of the name in it.

    Parameters
    ----------
    adapter : Adapter
    files : mapping of str to str
        What the file calls each module.
    leaf : callable
        The parts of a key, its name as the file has it.
    canonical : callable
        What the reader makes of a name of the file.
    named : callable
        What the file calls a module that has no pair.

    Raises
    ------
    FormatError
        Two of them would have one key.
    """
    tensors: dict[str, LazyArray] = {}
    as_read = all(module.origin and module.origin.format == adapter.format for module in adapter.modules.values())
    for key, extra in adapter.extra.items():
        parts = leaf(key)
        stem = parts.name if parts else extra.module if key.startswith(f"{extra.module}.") else ""
        if stem and not as_read:
            file = files.get(extra.module) or named(extra.module)
            key = key if canonical(stem) == canonical(file) else file + key[len(stem) :]
        add(tensors, {key: extra.tensor})
    return tensors


def owner(adapter: Adapter, extra: Extra) -> Update:
    """The module that an extra belongs to.

    Raises
    ------
    FormatError
        The adapter does not have it.
    """
    if extra.module not in adapter:
        raise FormatError("its module is not there", fix="convert with --drop-extra to leave it out")
    return adapter.modules[extra.module]


def check_encoder(name: str) -> None:
    """Refuse the layer of a text encoder whose name does not say which of a pipeline's encoders that is."""
    if lone_encoder((name,)):
        first = name.partition(".")[0]
        raise FormatError(
            "is a text encoder's layer, and nothing says which of the pipeline's text encoders that is",
            fix="give the pipeline's folder with --base, or say it with loralens convert: "
            f"--prefix {first}.=text_encoder.{first}.",
        )


def check_size(tensor: LazyArray, channels: int) -> None:
    """Refuse a tensor that does not hold one number for each channel of a weight."""
    if tensor.size != channels:
        raise ShapeError(f"{tensor.shape} is not one number a channel, of {channels}", fix=SAVE_AGAIN)


def add(tensors: dict[str, LazyArray], additions: Mapping[str, LazyArray]) -> None:
    """Put more tensors to those of a file; two of one key are refused."""
    for key, tensor in additions.items():
        if key in tensors:
            raise FormatError(f"{key} would be written twice", fix="leave one of the two out")
        tensors[key] = tensor
