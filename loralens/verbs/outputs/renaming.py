"""Renames the modules of an adapter that is written: to the names of its base, or by prefixes."""

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path

from loralens.arithmetic.dora import store_magnitudes
from loralens.core.adapter import Adapter
from loralens.core.carried import NORMS
from loralens.core.naming.matching import Match, Shape, match
from loralens.core.weights import with_kernels
from loralens.errors import OptionError, place
from loralens.formats.dialects.gguf.writer import tied_head_error
from loralens.formats.dialects.table import GGUF, QUANTISED
from loralens.formats.models.base_copies import FULL, drop_copies
from loralens.formats.models.checkpoint import model_config, resolve_path, shapes, weights
from loralens.formats.models.model_files import model_files
from loralens.merging.tying import Tied
from loralens.verbs.inputs.bases import base_weights

KEEPING = ("peft", QUANTISED)  # dialects that have a place for tensors saved in full


def named_as_in_base(adapter: Adapter, base: str | PathLike[str], to: str) -> tuple[Adapter, list[str]]:
    """The adapter under the names of the base, and what was done, in words.

    Of tensors saved in full those that are the base's own are left out, where the dialect ``to`` does not keep all.
    """
    base = Path(base)
    base_shapes = shapes(base)
    tied = _tied_heads(adapter, base, base_shapes)
    if tied and to == GGUF:
        with place(next(iter(tied))):
            raise tied_head_error()
    names = match({name: module.shape for name, module in adapter.items() if name not in tied}, base_shapes)
    notes = [str(names)]
    if tied:
        head = next(iter(tied))
        notes.append(f"{head} adapts the base's embedding, which is its head too, and has no weight of its own")
    adapter = with_kernels(adapter, {name: base_shapes[key] for name, key in names.keys.items()})
    if to not in KEEPING and any(extra.role in FULL for extra in adapter.extra.values()):
        adapter, copies = drop_copies(adapter, weights(base), names.rename)
        notes += [f"left out {key}: it is the base's own" for key in copies]
    if not names.edit or names.by_storage:  # names of files, and not of modules
        return adapter, notes
    modules = {name: _module_name(name, key) for name, key in names.keys.items()}
    return adapter.renamed({**_rename_extras(adapter, names, base_shapes), **modules, **tied}), notes


def _tied_heads(adapter: Adapter, base: Path, base_shapes: Mapping[str, Shape]) -> dict[str, str]:
    """The modules that adapt a head whose weight the base holds as its embedding alone, and what the head is called."""
    if all(f"{name}.weight" in base_shapes for name in adapter):
        return {}
    tied = Tied.of(model_files(resolve_path(base)).tensors, model_config(base) or {})
    if not (tied.lacks_head and tied.ties.head):
        return {}
    head = tied.ties.head.removesuffix(".weight")
    return {name: head for name in adapter if f".{name}".endswith(f".{head}")}


def _rename_extras(adapter: Adapter, names: Match, base_keys: Collection[str]) -> Mapping[str, str]:
    """The names in the base of modules that the adapter speaks of without a pair: norms, heads."""
    alone = {extra.module for extra in adapter.extra.values()}.difference(adapter)
    renamed = {name: names.rename(name) for name in alone}
    return {old: new for old, new in renamed.items() if f"{new}.weight" in base_keys or new in base_keys}


def _module_name(name: str, key: str) -> str:
    """The module of a weight's key, with the expert's number that the old name has."""
    bracket = name[name.rindex("[") :] if name.endswith("]") else ""
    return key.removesuffix(".weight") + bracket


def with_prefixes(adapter: Adapter, prefixes: Sequence[str] | Mapping[str, str]) -> Adapter:
    """The adapter, its modules renamed that begin with a prefix.

    Parameters
    ----------
    adapter : Adapter
    prefixes : sequence of str, or mapping of str to str
        ``"OLD=NEW"`` each, or ``{old: new}``; one after the other.

    Raises
    ------
    OptionError
        No module begins with a prefix, or a text is not OLD=NEW.
    """
    if isinstance(prefixes, Mapping):
        prefixes = [f"{old}={new}" for old, new in prefixes.items()]
    for pair in [prefixes] if isinstance(prefixes, str) else prefixes:
        adapter = adapter.renamed(_names_with_prefix(adapter, pair))
    return adapter


def _names_with_prefix(adapter: Adapter, pair: str) -> Mapping[str, str]:
    old, equals, new = pair.partition("=")
    modules = [*adapter, *{extra.module for extra in adapter.extra.values()}.difference(adapter)]
    names = {name: new + name[len(old) :] for name in modules if name.startswith(old)}
    if not equals or not names:
        first = next(iter(adapter), "nothing")
        what = f"matches nothing; the first name is {first}" if equals else "is not OLD=NEW"
        raise OptionError(f"--prefix {pair} {what}", fix="give a prefix that modules have: --prefix unet.=transformer.")
    return names


def with_magnitudes(adapter: Adapter, base: str | PathLike[str] | None) -> tuple[Adapter, list[str]]:
    """The adapter with the magnitudes of DoRA that its file lacks, where a base is there to make them from.

    And what was done, in words.
    """
    missing = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    if base is None or not missing:
        return adapter, []
    completed = store_magnitudes(adapter, base_weights(base, {name: adapter[name] for name in missing}).modules)
    return completed, [f"magnitudes of {len(missing)} DoRA modules written as the lengths of the base's weights"]
