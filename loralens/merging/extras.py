"""What an adapter carries besides pairs, as changes of stored tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

from loralens.core.adapter import Adapter, Extra
from loralens.core.carried import MAGNITUDES, NORMS
from loralens.core.lazy import LazyArray
from loralens.core.structured import Dense, Structured
from loralens.core.weights import Weights
from loralens.errors import FormatError, MismatchError
from loralens.merging.plan import Tokens, as_matrix
from loralens.merging.update import Weighted

UNREADABLE = {  # role → why a merge cannot honour it
    "shape": "weights padded to another shape",
    "diagonal": "KaSA's diagonal, whose base was truncated",
    "other": "tensors that were not understood",
}


@final
@dataclass(frozen=True, slots=True)
class Changes:
    """What an adapter says of one stored tensor besides its pair.

    Attributes
    ----------
    replacement : LazyArray or None
    tokens : Tokens or None
    magnitude : tuple of (LazyArray or None, bool) or None
        DoRA's lengths, None where those of the base stand for them, and whether there is one an output.
    added : tuple of (float, Structured)
        Differences.
    """

    replacement: LazyArray | None = None
    tokens: Tokens | None = None
    magnitude: tuple[LazyArray | None, bool] | None = None
    added: tuple[Weighted, ...] = ()


@final
@dataclass(slots=True)
class Found:
    """The changes by key of the base, what has no place there, and what to tell the user."""

    changes: dict[str, Changes] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def changes_of(adapter: Adapter, strength: float, weights: Weights, base: Mapping[str, LazyArray]) -> Found:
    """The changes that an adapter's extras make.

    Replacements (saved modules, PEFT's biases, token rows) and DoRA's magnitudes stand as they are, whatever
    ``strength``; differences count that often.

    Raises
    ------
    FormatError
        Tensors of a role that a merge cannot honour, by name.
    MismatchError
        A difference or a replacement of another shape than its tensor.
    """
    found = Found()
    for key, extra in adapter.extra.items():
        if extra.role in UNREADABLE:
            raise FormatError(
                f"{key}: {UNREADABLE[extra.role]} cannot be merged",
                fix="name the modules to merge with --modules: what belongs to none of them is left out",
            )
        if extra.role != "copy":
            _one(key, extra, adapter, strength, weights, base, found)
    count = sum(extra.role in NORMS for extra in adapter.extra.values())
    if count:
        found.notes.append(f"{count} DoRA modules have no magnitude in the file: the lengths of W stand for it")
    replaced = [key for key, change in found.changes.items() if change.replacement is not None]
    if replaced and strength != 1:
        what = "1 tensor" if len(replaced) == 1 else f"{len(replaced)} tensors"
        found.notes.append(f"{what} trained in full: in place of what the base has, whatever the adapter's weight")
    return found


def _one(
    key: str,
    extra: Extra,
    adapter: Adapter,
    strength: float,
    weights: Weights,
    base: Mapping[str, LazyArray],
    found: Found,
) -> None:
    """Put what one extra changes into ``found``."""
    if extra.module in weights.modules and weights.modules[extra.module].scattered:
        raise MismatchError(
            f"{key}: the base holds the weight of {extra.module} in parts, and a {extra.role} is of the whole",
            fix="leave this module out with --modules, or merge it where it was trained",
        )
    home = _home(extra, weights)
    whole = extra.role in (*MAGNITUDES, "tokens")  # of the weight itself
    target = home if whole else f"{home.removesuffix('.weight')}.{extra.parameter}"
    if target not in base and extra.role not in ("saved", "embedding"):
        found.missing.append(key)
        return
    found.changes[target] = _more(found.changes.get(target, Changes()), key, extra, adapter, strength, base, target)


def _home(extra: Extra, weights: Weights) -> str:
    """The base's key of the weight of the module that an extra belongs to."""
    if extra.module in weights.modules:
        return weights.modules[extra.module].key
    return f"{weights.match.rename(extra.module)}.weight"


def _more(
    here: Changes, key: str, extra: Extra, adapter: Adapter, strength: float, base: Mapping[str, LazyArray], target: str
) -> Changes:
    """What is said of a tensor ``here``, and what one more extra says of it."""
    tensor, role = extra.tensor, extra.role
    if role in ("saved", "bias", "embedding"):
        same = target not in base or base[target].shape == tensor.shape or role == "embedding"
        if not same:
            raise MismatchError(
                f"{key} {tensor.shape} is to replace {target} {base[target].shape}",
                fix="give the base it was trained on",
            )
        return replace(here, replacement=tensor)
    if role == "tokens":
        return replace(here, tokens=_tokens(key, extra, adapter.config))
    if role in MAGNITUDES:
        return replace(here, magnitude=(None if role in NORMS else tensor, role in ("magnitude", "norms")))
    assert role in ("lora_bias", "diff", "diff_b"), role
    if as_matrix(tensor.shape) != as_matrix(base[target].shape):
        raise MismatchError(
            f"{key} {tensor.shape} is to be added to {target} {base[target].shape}",
            fix="give the base it was trained on",
        )
    scale = adapter[extra.module].scale if role == "lora_bias" else 1.0
    term = (strength, Structured(Dense(tensor.reshape(*as_matrix(tensor.shape))), scale))
    return replace(here, added=(*here.added, term))


def _tokens(key: str, extra: Extra, config: Mapping[str, Any] | None) -> Tokens:
    """Which rows of the embedding were trained: the configuration says it."""
    said = (config or {}).get("trainable_token_indices")
    if isinstance(said, dict):
        said = next((rows for name, rows in said.items() if f".{extra.module}".endswith(f".{name}")), None)
    if not isinstance(said, list) or not all(type(i) is int and i >= 0 for i in said):
        raise FormatError(f"{key}: nothing says which rows these are", fix="put adapter_config.json beside the file")
    if len(said) != extra.tensor.shape[0]:
        raise FormatError(f"{key}: {extra.tensor.shape[0]} rows for {len(said)} tokens", fix="save the adapter again")
    return Tokens(tuple(said), extra.tensor)
