"""Writing extras (tensors that are not half of a pair): they are translated to another dialect, or refused by name."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import final

import numpy as np

from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Scaling
from loralens.core.names import some
from loralens.core.structured import Update
from loralens.core.together import MAGNITUDES, NORMS
from loralens.errors import LEAVE_OUT, FormatError, ShapeError, place
from loralens.formats.dialects.pairs import SAVE_AGAIN, Extras, Leaf, Modules, Parts, pack_pair, stored_parts
from loralens.formats.files.container import Stored

DROP = "convert with --drop-extra to leave it out"


def translatable_extras(adapter: Adapter, roles: Collection[str], title: str) -> Extras:
    """The extras of an adapter from another dialect, after a check that ``title`` can hold all their roles.

    Raises
    ------
    FormatError
        It has extras of other roles. The message names them; they are never dropped silently.
    """
    norms = [extra.module for extra in adapter.extra.values() if extra.role in NORMS]
    # The norms have to be computed from the base, which the caller does with --base.
    if norms:
        raise FormatError(
            f"the magnitudes of {len(norms)} DoRA modules are not in the file (the first is {norms[0]}), but {title} "
            "needs them",
            fix="give --base, so that the lengths in its weights are written; or merge it into the base",
        )
    lost = [f"{key} ({extra.role})" for key, extra in adapter.extra.items() if extra.role not in roles]
    if lost:
        fix = "convert with --drop-extra to leave them out"
        # PEFT saves embeddings with every resized vocabulary, whether they were trained or not.
        if any(extra.role == "embedding" for extra in adapter.extra.values()):
            fix += "; --base leaves out embeddings that PEFT saved although they equal the base's"
        raise FormatError(f"{title} has no place for {some(lost)}", fix=fix)
    return adapter.extra


DORA = ("magnitude", "magnitude_in")  # roles of extras that are a dora_scale
KINDS = ("linear", "conv", "merged")  # the kinds of weights that the programs with lora_up and lora_down adapt


@final
@dataclass(frozen=True)
class UpDown:
    """How the files of a dialect hold lora_up, lora_down and alpha, under names that may have several spellings.

    Attributes
    ----------
    leaf
        Splits a key into the name in the file and the part.
    canonical
        Maps a name in the file to the name that the reader gives.
    scaling
        The scale of stored parts at a rank.
    alpha
        The α of a module in the file.
    adapts
        The beginning of the message about a kind of weight that the dialect's programs do not adapt.
    """

    form: str
    leaf: Callable[[str], Leaf | None]
    canonical: Callable[[str], str]
    scaling: Callable[[Parts, int], Scaling]
    alpha: Callable[[Update], np.float32]
    adapts: str

    def is_as_read(self, module: Update) -> bool:
        """Whether the stored tensors still describe the module, including its scale."""
        parts = stored_parts(module, self.form, self.leaf)
        return bool(parts) and self.scaling(parts, module.rank).value == module.scale

    def write(
        self,
        adapter: Adapter,
        named: Callable[[str], str],
        roles: Collection[str],
        title: str,
        translate: "Translate",
    ) -> Stored:
        """The tensors of a file. A module that was read from such a file keeps its keys.

        ``named`` gives the name in the file for a module of another dialect, or refuses it; the other parameters are
        those of `translate_extras`, where ``translate`` gives the leaf of a key.

        Raises
        ------
        FormatError
            Two modules would be read under one name, or two extras would have one key, or the file cannot hold one.
        """
        files: dict[str, str] = {}
        owners: dict[str, str] = {}
        tensors: dict[str, LazyArray] = {}
        for name, module in adapter.items():
            with place(name):
                parts = stored_parts(module, self.form, self.leaf)
                stored_leaf = self.leaf(parts["A"][0]) if parts else None
                files[name] = file = stored_leaf.name if stored_leaf else named(name)
                # Dots and underscores may become the same, or several spellings may stand for one layer of a pipeline.
                owner = owners.setdefault(self.canonical(file), name)
                if owner != name:
                    raise FormatError(f"{owner} would be called {self.canonical(file)} too", fix=LEAVE_OUT)
                as_read = module.origin and self.is_as_read(module)
                tensors |= module.origin.tensors if as_read else self._tensors(file, module, parts)
        # Magnitudes of layers that were joined into one matrix have no key of this dialect yet.
        own = {
            key: extra
            for key, extra in adapter.extra.items()
            if adapter.format == self.form and (extra.role not in DORA or self.leaf(key))
        }
        self._keep(tensors, own, adapter, files, named)
        others = replace(adapter, extra={key: extra for key, extra in adapter.extra.items() if key not in own})

        def translated(extra: Extra, module: Update, channels: int) -> tuple[str, LazyArray]:
            leaf, tensor = translate(extra, module, channels)
            return f"{files[extra.module]}.{leaf}", tensor

        add_tensors(tensors, translate_extras(others, roles, title, translated))
        names = {self.canonical(file): name for name, file in files.items() if self.canonical(file) != name}
        return Stored(dict(sorted(tensors.items())), names=names)

    def _tensors(self, file: str, module: Update, parts: Parts) -> dict[str, LazyArray]:
        """The three tensors of a module. Halves that are only rescaled stay as they were stored."""
        if module.layout.kind not in KINDS:
            what = f"{self.adapts} linear layers and convolutions, but this is of kind {module.layout.kind!r}"
            raise FormatError(what, fix=LEAVE_OUT)
        alpha = self.alpha(module)
        B, A = (parts["B"][1], parts["A"][1]) if parts else pack_pair(module)
        # There is no α that means a scale of 0 in kohya's software, so lora_up is written as zeros.
        if module.scale == 0 and alpha:
            B = B.map(np.zeros_like, shape=B.shape)
        keys = {"A": f"{file}.lora_down.weight", "B": f"{file}.lora_up.weight", "alpha": f"{file}.alpha"}
        keys |= {part: key for part, (key, _) in parts.items()}
        return {keys["B"]: B, keys["A"]: A, keys["alpha"]: LazyArray.of(np.array(alpha))}

    def _keep(
        self,
        tensors: dict[str, LazyArray],
        extras: Extras,
        adapter: Adapter,
        files: Mapping[str, str],
        named: Callable[[str], str],
    ) -> None:
        """Add the extras of an adapter that is written in its own dialect, under keys that name their modules.

        A module may have been renamed. A key is unchanged if all modules are as they were read, or if it still contains
        the name that the file gives to the module. Otherwise the name in the key is replaced.
        """
        # One renamed module is enough to check every key.
        as_read = all(module.origin and module.origin.format == self.form for module in adapter.modules.values())
        for key, extra in extras.items():
            parts = self.leaf(key)
            # A key of unknown form begins with its module, as the reader assumed, or names none.
            stem = parts.name if parts else extra.module if key.startswith(f"{extra.module}.") else ""
            if stem and not as_read:
                file = files.get(extra.module) or named(extra.module)
                key = key if self.canonical(stem) == self.canonical(file) else file + key[len(stem) :]
            add_tensors(tensors, {key: extra.tensor})


def dora_scale(extra: Extra, module: Update, channels: int) -> LazyArray:
    """A magnitude in the shape of a ``dora_scale``, which broadcasts over the weight."""
    axes = (channels, 1) if extra.role == "magnitude" else (1, channels)
    return extra.tensor.reshape(*axes, *(1 for _ in module.layout.kernel))


# An extra, its module and the number of channels → the key and the tensor in the file.
Translate = Callable[[Extra, Update, int], tuple[str, LazyArray]]


def translate_extras(
    adapter: Adapter, roles: Collection[str], title: str, translate: Translate
) -> dict[str, LazyArray]:
    """The extras of an adapter from another dialect, which have one number for each channel of their module.

    Raises
    ------
    FormatError, ShapeError
        ``title`` cannot hold extras of other roles, an extra has no module or another size, or two have one key.
    """
    tensors: dict[str, LazyArray] = {}
    for key, extra in translatable_extras(adapter, roles, title).items():
        with place(key):
            if extra.module not in adapter:
                raise FormatError("the file does not contain its module", fix=DROP)
            module = adapter.modules[extra.module]
            # A magnitude by input has one number for each input channel, whatever the kernel is.
            by_input = extra.role == "magnitude_in"
            channels = module.shape[1] // prod(module.layout.kernel) if by_input else module.shape[0]
            if extra.tensor.size != channels:
                what = f"{extra.tensor.shape} is not one number for each of {channels} channels"
                raise ShapeError(what, fix=SAVE_AGAIN)
            add_tensors(tensors, dict([translate(extra, module, channels)]))
    return tensors


def check_all_dora(adapter: Adapter, title: str, *, part: Callable[[str], str] = lambda _: "") -> None:
    """Refuse an adapter in which only some modules are DoRA.

    The software ``title`` makes all modules DoRA or none, in each group of modules that ``part`` tells by their names.
    """
    dora = {extra.module for extra in adapter.extra.values() if extra.role in MAGNITUDES}
    parts = {part(name) for name in dora}
    plain = [name for name in adapter if name not in dora and part(name) in parts]
    if plain:
        which = f"{len(plain)} of {len(adapter)} modules (the first is {plain[0]})"
        what = f"{which} have no DoRA magnitude, but {title} makes all of them DoRA"
        raise FormatError(what, fix=f"for the modules of one of the two kinds, {LEAVE_OUT}")


def check_encoder(name: str) -> None:
    """Refuse a layer of a text encoder whose name does not say which encoder of the pipeline it belongs to."""
    from loralens.core.image_names import lone_encoder  # its expressions take 5 ms to compile

    # A pipeline may have three text encoders with layers of the same names.
    if lone_encoder((name,)):
        first = name.partition(".")[0]
        raise FormatError(
            "is a text encoder's layer, but nothing says which of the pipeline's text encoders that is",
            fix="give the pipeline's folder with --base, or say it with loralens convert: "
            f"--prefix {first}.=text_encoder.{first}.",
        )


def add_tensors(tensors: dict[str, LazyArray], additions: Mapping[str, LazyArray]) -> None:
    """Add tensors to those of a file; two with the same key are refused."""
    for key, tensor in additions.items():
        if key in tensors:
            raise FormatError(f"{key} would be written twice", fix="leave one of the two out")
        tensors[key] = tensor


# kind of layout → role of a missing magnitude. PEFT and diffusers have one length for each output.
PEFT_NORMS = {"linear": "norms", "conv": "norms", "embedding": "norms"}
NOTHING = LazyArray.of(np.zeros(0, np.float32))  # the tensor of an extra for which the file has no numbers


def missing_magnitudes(modules: Modules, extra: Extras, roles: Mapping[str, str], key: str) -> dict[str, Extra]:
    """Extras with the roles ``norms`` and ``norms_in`` for the modules of a DoRA adapter that have no magnitude.

    Parameters
    ----------
    modules, extra
        The modules and extras of the adapter.
    roles : mapping of str to str
        Kind of layout → role. A kind that is missing here is never DoRA.
    key : str
        The key that the magnitude of a module would have in a file, with ``{}`` for the module's name.
    """
    with_magnitude = {item.module for item in extra.values() if item.role in MAGNITUDES}
    return {
        key.format(name): Extra(roles[module.layout.kind], name, NOTHING)
        for name, module in modules.items()
        # A stack of experts, for example, is never DoRA in PEFT.
        if name not in with_magnitude and module.layout.kind in roles
    }


def magnitude_findings(extra: Extras, *, software: str) -> list[Finding]:
    """The warning about missing magnitudes, if there are any."""
    missing = [item.module for item in extra.values() if item.role in NORMS]
    if not missing:
        return []
    count = sum(item.role in MAGNITUDES for item in extra.values())
    text = (
        f"{len(missing)} of {count} DoRA modules have no magnitude in the file (the first is {missing[0]}): {software} "
        "uses the lengths in W, W' = ‖W‖ · (W+ΔW)/‖W+ΔW‖, and so do commands that are given the base; without a base, "
        "only ΔW = scale·B·A is measured"
    )
    fix = "save the adapter again from training if it trained magnitudes"
    return [Finding("warning", "dora-magnitudes-missing", text, fix)]
