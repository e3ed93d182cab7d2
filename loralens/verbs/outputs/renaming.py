"""Renames the modules of an adapter for `convert`, to the names of its base or by prefixes, and adds magnitudes."""

from collections.abc import Collection, Mapping, Sequence
from os import PathLike
from pathlib import Path

from loralens.core.adapter import Adapter
from loralens.core.carried import NORMS
from loralens.core.messages import warn
from loralens.core.names import some
from loralens.core.naming.matching import Match, Shape, match
from loralens.core.weights import with_kernels
from loralens.errors import OptionError, place
from loralens.formats.dialects.table import GGUF
from loralens.formats.models.base_copies import FULL, drop_copies
from loralens.formats.models.checkpoint import model_config, shapes, weights
from loralens.formats.models.model_location import resolve_path
from loralens.verbs.inputs.bases import base_weights


def rename_as_in_base(adapter: Adapter, base: str | PathLike[str], to: str) -> tuple[Adapter, list[str]]:
    """The adapter with the names that its modules have in the base, and notes for the user.

    PEFT saves embeddings and heads in full even if they were not trained. If the dialect ``to`` has no place for such
    tensors, those that equal the base's own are left out.

    Raises
    ------
    MismatchError
        Some module has no weight in the base, or the dialect cannot adapt a head that shares the embedding's weight.
    """
    base = Path(base)
    base_shapes = shapes(base)
    tied = _tied_heads(adapter, base, base_shapes)
    # llama.cpp has no output tensor of its own for such a model, so there is nothing that the pair could adapt.
    if tied and to == GGUF:
        with place(next(iter(tied))):
            from loralens.formats.dialects.gguf.writer import tied_head_error

            raise tied_head_error()
    names = match({name: module.shape for name, module in adapter.items() if name not in tied}, base_shapes)
    notes = [str(names)]
    if tied:
        head = next(iter(tied))
        notes.append(f"{head} adapts the base's embedding, which is its head too, and has no weight of its own")
    # PEFT and LyCORIS store the kernels of convolutions flat; their sizes are known only from the base.
    adapter = with_kernels(adapter, {name: base_shapes[key] for name, key in names.keys.items()})
    # Only PEFT has a place for such tensors. Elsewhere one is an error, or a copy that is left out.
    if to != "peft" and any(extra.role in FULL for extra in adapter.extra.values()):
        adapter, copies = drop_copies(adapter, weights(base), names.rename)
        notes += [f"left out {key}: it is the base's own" for key in copies]
    # A base whose files have other names than its modules in memory says nothing about the names of modules.
    if not names.edit or names.by_storage:
        return adapter, notes
    modules = {}
    for name, key in names.keys.items():
        # All experts of a stack adapt one weight; the number in brackets tells them apart.
        expert = name[name.rindex("[") :] if name.endswith("]") else ""
        modules[name] = key.removesuffix(".weight") + expert
    return adapter.renamed({**_rename_extras(adapter, names, base_shapes), **modules, **tied}), notes


def _tied_heads(adapter: Adapter, base: Path, base_shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Module → name of the head, for modules that adapt a head whose weight the base stores only as its embedding."""
    # Checked first, since looking for ties opens the files of the base.
    if all(f"{name}.weight" in base_shapes for name in adapter):
        return {}
    from loralens.formats.models.model_files import model_files  # few bases lack a weight, and these read all layouts
    from loralens.merging.tied_weights import Tied

    tied = Tied.of(model_files(resolve_path(base)).tensors, model_config(base) or {})
    if not (tied.lacks_head and tied.ties.head):
        return {}
    head = tied.ties.head.removesuffix(".weight")
    return {name: head for name in adapter if f".{name}".endswith(f".{head}")}


def _rename_extras(adapter: Adapter, names: Match, base_keys: Collection[str]) -> Mapping[str, str]:
    """Old name → new name of modules that have a tensor but no pair in the adapter, such as norms and heads."""
    alone = {extra.module for extra in adapter.extra.values()}.difference(adapter)
    renamed = {name: names.rename(name) for name in alone}
    # A new head has no weight in the base, and keeps its name.
    return {old: new for old, new in renamed.items() if f"{new}.weight" in base_keys or new in base_keys}


def replace_prefixes(adapter: Adapter, prefixes: Sequence[str] | Mapping[str, str]) -> Adapter:
    """The adapter with another beginning of the names of its modules.

    Parameters
    ----------
    adapter : Adapter
    prefixes : sequence of str, or mapping of str to str
        Texts ``"OLD=NEW"``, or ``{old: new}``. They are applied one after the other, so a later one may change what an
        earlier one has made.

    Raises
    ------
    OptionError
        No module begins with OLD, or a text has no ``=``.
    """
    if isinstance(prefixes, Mapping):
        prefixes = [f"{old}={new}" for old, new in prefixes.items()]
    for pair in [prefixes] if isinstance(prefixes, str) else prefixes:
        old, equals, new = pair.partition("=")
        # Norms and heads have no pair, but belong to the same model.
        modules = {*adapter, *(extra.module for extra in adapter.extra.values())}
        names = {name: new + name[len(old) :] for name in modules if name.startswith(old)}
        if not equals or not names:
            first = next(iter(adapter), "nothing")
            what = f"matches nothing; the first name is {first}" if equals else "is not OLD=NEW"
            fix = "give a prefix that modules have: --prefix unet.=transformer."
            raise OptionError(f"--prefix {pair} {what}", fix=fix)
        adapter = adapter.renamed(names)
    return adapter


def add_magnitudes(adapter: Adapter, base: str | PathLike[str] | None) -> tuple[Adapter, list[str]]:
    """The adapter with the magnitudes of DoRA that its file lacks, and a note about them.

    Such a file means m = ‖W‖, the value at which PEFT starts training. These lengths need the ``base``; without it the
    adapter stays as it is.
    """
    missing = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    if base is None or not missing:
        return adapter, []
    from loralens.arithmetic.dora import store_magnitudes  # few adapters lack magnitudes

    completed = store_magnitudes(adapter, base_weights(base, {name: adapter[name] for name in missing}).modules)
    return completed, [f"magnitudes of {len(missing)} DoRA modules written as the lengths of the base's weights"]


def with_known_names(adapter: Adapter, to: str) -> tuple[Adapter, list[str]]:
    """A kohya adapter with the names of sd-scripts and ComfyUI, if its file has others, and notes for the user.

    Adapters that come from or go to another dialect stay as they are, since writers give new names. If all names are
    right, the modules stay as they were read. Names of a model that is not known here stay too, with a warning if
    neither program has them.
    """
    _warn_of_numbers(adapter, to)
    if not to == adapter.format == "kohya":
        return adapter, []
    # Imported here, since most conversions are of other dialects.
    from loralens.core.naming.image_names import comfyui_has, sd_scripts_has
    from loralens.formats.dialects.image import files_of_kohya, fit_image, kohya_names

    files, right = files_of_kohya(adapter), kohya_names(adapter)
    wrong = [file for name, file in files.items() if file != right.get(name)]
    if right and not wrong:
        return adapter, []
    if right:
        joined = fit_image("kohya", adapter.map(lambda module: module.without_origin()))
        new_names = {name: file for name, file in kohya_names(joined).items() if file != name}
        note = f"{len(wrong)} of {len(files)} modules got the names that sd-scripts has; the first was {wrong[0]}"
        return joined.renamed(new_names), [note]
    unknown = [file for file in files.values() if not (sd_scripts_has(file) or comfyui_has(file))]
    if unknown:
        warn(
            f"sd-scripts and ComfyUI pass over {len(unknown)} of {len(files)} modules, whose names they do not have: "
            f"{some(unknown, 1)}",
            "rename them: --prefix OLD=NEW. Only those of SD, SDXL and FLUX.1 are known without it",
        )
    return adapter, []


def _warn_of_numbers(adapter: Adapter, to: str) -> None:
    """Warn that no program finds the layers of modules that have numbers for names, as in files of cloneofsimo."""
    if adapter.format == "safeloras" and to != adapter.format:
        warn(
            f"the modules have numbers for names, so no program will find their layers in the {to} file",
            "load the original file with the program lora of cloneofsimo, or merge it there",
        )


def warn_of_components(adapter: Adapter, format_before: str) -> None:
    """Warn that diffusers or PEFT loads nothing of a file, as its names have no component, or one too many."""
    if adapter.format not in ("diffusers", "peft"):
        return
    from loralens.formats.dialects.diffusers.keys import component  # for these dialects only

    owners = sorted({component(name) for name in adapter})
    if adapter.format == "diffusers" and owners == [""]:
        warn(
            f"no name says to which component of the pipeline it belongs ({some(adapter, 1)}), so a pipeline of "
            "diffusers loads nothing of the file",
            "say it if diffusers has these layers: --prefix =transformer. (a model alone loads the file as it is with "
            "load_lora_adapter(…, prefix=None))",
        )
    # The layers of a language model may lie below `transformer.` too, but not in a file of these dialects.
    if adapter.format == "peft" and format_before in ("diffusers", "comfyui") and any(owners):
        alone = f"--prefix {owners[-1]}.=" if len(owners) == 1 else "convert the file of one component alone"
        warn(
            f"the names begin with the component of a pipeline ({some(adapter, 1)}); PEFT takes the layers of one "
            "model, whose names have none, and finds no module for these",
            f"for a model alone: {alone}; diffusers and ComfyUI read the file as it was",
        )
