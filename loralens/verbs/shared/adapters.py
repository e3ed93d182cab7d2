"""Adapters and base models as inputs of a verb: reading them, labels and weights, warnings if they do not fit."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import isfinite
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from loralens.core.adapter import Adapter, Finding
from loralens.core.base_model import BaseModel, contradiction, find_contradiction
from loralens.core.messages import command_line, tell, tell_findings, warn
from loralens.core.model_in_memory import ModelInMemory, ModelPath
from loralens.core.names import some
from loralens.core.selection import select
from loralens.core.stored import Ingredient, Strength
from loralens.core.tensors import is_model
from loralens.core.together import magnitudes
from loralens.errors import NOT_FINITE, FormatError, LoraLensError, OptionError, place
from loralens.exports import READERS
from loralens.formats import load
from loralens.formats.files.container import read_json
from loralens.formats.files.location import SUFFIXES, find_adapter, known_folder
from loralens.formats.records.training import grid_runs, is_finished, read_run
from loralens.tables.numbers import number
from loralens.tables.result import Tabular
from loralens.verbs.shared.options import Reading

if TYPE_CHECKING:
    from loralens.choices import Consumer
    from loralens.core.matching import Match, Shape
    from loralens.core.structured import Updates
    from loralens.core.weights import Weights
    from loralens.formats.models.checkpoint import Checkpoint


AdapterSource = str | PathLike[str] | Adapter
Source = AdapterSource | Sequence[AdapterSource]

ADAPTERS = "give a path, what loralens.load returns, a model of PEFT, (state_dict, config) or a result with an adapter"


def as_source(value: Any) -> Any:
    """What a verb was given, with adapters in place of all that holds one: models, state dicts and results.

    Lists, pairs with weights and mappings from adapters to weights stay what they are, with their parts read. What
    holds no adapter stays too; the verb refuses it.

    Raises
    ------
    OptionError
        A model has no adapter, or several of its adapters are active; a result is of several adapters, and none was
        written.
    """
    if isinstance(value, str | PathLike | Adapter):
        return value
    if is_model(value):
        return _adapter_of_model(value)
    if isinstance(value, tuple) and len(value) == 2 and _is_state_dict(value[0]) and _is_peft_config(value[1]):
        return _adapter_of_tensors(*value)
    if _is_state_dict(value):
        return _adapter_of_tensors(value, None)
    if isinstance(value, Mapping) and not isinstance(value, Tabular):
        return {as_source(key): weight for key, weight in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(as_source, value))
    if isinstance(value, Tabular):
        return _adapter_of_result(value)
    return value


def as_base(value: Any) -> Any:
    """What a verb was given as its base, with a model of torch or a pipeline of diffusers as a `ModelInMemory`."""
    if value is None or isinstance(value, str | PathLike | ModelInMemory):
        return value
    components = getattr(value, "components", None)
    if is_model(value) or (isinstance(components, Mapping) and any(map(is_model, components.values()))):
        return ModelInMemory(value)
    raise OptionError(f"{_shown(value)} is not a base model", fix="give a path, or a model of torch")


def check_on_disk(value: object) -> None:
    """Refuse a model in memory where a verb compares files with what a merge has written."""
    if not isinstance(value, str | PathLike):
        raise OptionError(f"{_shown(value)} is not the path of a merged model", fix="save the model and give its path")


# Every verb takes these in all its parameters of such a type.
READERS.update({Adapter: as_source, ModelInMemory: as_base})


def _is_state_dict(value: object) -> bool:
    """Whether a mapping holds tensors; one of weights of adapters, or of modules, holds numbers."""
    return isinstance(value, Mapping) and bool(value) and all(hasattr(each, "shape") for each in value.values())


def _is_peft_config(value: object) -> bool:
    """Whether a value is a configuration of PEFT, or the content of its file."""
    return hasattr(value, "peft_type") or (isinstance(value, Mapping) and bool({"peft_type", "r"} & value.keys()))


def _adapter_of_tensors(tensors: Mapping[str, Any], config: Any) -> Adapter:
    """The adapter in a state dict, with messages about what its reader noticed."""
    adapter = load(tensors, config=config)
    tell_findings(adapter.source, adapter.findings)
    return adapter


def _adapter_of_model(model: Any) -> Adapter:
    """A view of the adapter of a model; of several adapters of PEFT, the one that is active."""
    from loralens.watching.view import active_adapters, live, peft_model  # torch takes a second

    holder = peft_model(model)
    if holder is not None and len(active := active_adapters(holder)) > 1:
        what = f"{len(active)} of the adapters {some(list(holder.peft_config))} are active"
        fix = "name one: model.set_adapter(NAME) or loralens.live(model, NAME); loralens.live(model) is their sum"
        raise OptionError(what, fix=fix)
    return live(model)


def _adapter_of_result(result: Tabular) -> Any:
    """The adapter of a result, or the places of those that it has written; the result itself if it has none."""
    holder = getattr(result, "removal", None) or result
    if isinstance(adapter := getattr(holder, "adapter", None), Adapter):
        return adapter
    rows = [row for row in getattr(result, "rows", ()) if hasattr(row, "target")]
    targets = [row.target for row in rows if row.target is not None and Path(row.target).exists()]
    if rows and not targets:
        raise OptionError("nothing was written of these adapters", fix="give output, or the adapters one by one")
    # Of a verb on several models or runs, each of which has one.
    held = [_adapter_of_result(each) for each in getattr(result, "adapters", ()) if isinstance(each, Tabular)]
    return targets or held or result


def _shown(value: object) -> str:
    """A value in a message, which has one line, as the repr of an array has not."""
    return " ".join(f"{value!r:.200}".split())


# Codes of findings that say what an adapter carries besides ΔW: DoRA's magnitudes, and differences and weights in full.
# A verb that applies these too must not say that they are left out.
DORA, DIFFERENCES = "use-dora", frozenset({"full-difference", "bias-difference", "set-weight"})


def sources(adapters: Sequence[Source]) -> list[AdapterSource]:
    """The adapters of ``verb(a, b)``, ``verb([a, b])`` and ``verb("a")`` as one list.

    Raises
    ------
    OptionError
        There is no adapter, or an argument is neither a path nor an adapter.
    """
    flat: list[AdapterSource] = []
    for source in adapters:
        # Lists and tuples only, as a path that is a string is a sequence too.
        if isinstance(source, list | tuple):
            flat += source
        else:
            flat.append(source)  # type: ignore[arg-type]  # what is not an adapter is refused below
    for source in flat:
        if not isinstance(source, str | PathLike | Adapter):
            raise OptionError(f"{_shown(source)} is not an adapter", fix=ADAPTERS)
    if not flat:
        raise OptionError("no adapter is given", fix=f"give one or several: {ADAPTERS.removeprefix('give ')}")
    return flat


def find_source(source: Source) -> tuple[AdapterSource, str]:
    """The one adapter that a verb was given, with its file found once for all that the verb does with it; its label."""
    if isinstance(source, Adapter):
        return source, source.source or "adapter"
    return find_adapter(cast("str | PathLike[str]", source)), str(source)


def labels(adapters: Sequence[AdapterSource]) -> list[str]:
    """The labels of adapters in messages and tables: their paths, or where objects came from.

    Objects are numbered if there are several of one origin, or of none.
    """
    names = [source.source if isinstance(source, Adapter) else str(source) for source in adapters]
    # They are counted from 1, as people count arguments.
    return [
        f"{name or 'adapter'} {i}"
        if isinstance(source, Adapter) and len(adapters) > 1 and (not name or names.count(name) > 1)
        else name or "adapter"
        for i, (source, name) in enumerate(zip(adapters, names, strict=True), start=1)
    ]


def short_labels(paths: Sequence[str]) -> list[str]:
    """The paths without the folders that all of them share; numbers tell apart paths that were given twice."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    # The last part stays, even where all paths are equal.
    while all(len(names) > shared + 1 for names in parts) and len({names[shared] for names in parts}) == 1:
        shared += 1
    short = [str(Path(*names[shared:])) for names in parts]
    return short if len(set(short)) == len(short) else [f"{name} ({i})" for i, name in enumerate(short, start=1)]


def read_adapter(
    source: AdapterSource,
    reading: Reading,
    *,
    base: ModelPath | None = None,
    applies_all: bool = False,
    label: str = "adapter",
) -> Adapter:
    """Read the adapter that a verb was given, with messages.

    Messages say what the reader noticed, and warn if ``base`` is not the base that the adapter names.

    Parameters
    ----------
    source : path, Adapter or model
    reading : Reading
    base : path or model, optional
        The base model, or the model that will carry the adapter.
    applies_all : bool
        The verb applies everything that the adapter carries, DoRA's magnitudes and full differences too. Messages that
        these are left out of ΔW would be wrong, and are not given.
    label : str
        The label of an object in messages.

    Raises
    ------
    FormatError
        The file cannot be read as an adapter.
    OptionError
        An option of ``reading`` was given for an adapter that has already been read.
    """
    adapter = load_source(source, reading, base=base, strict=True)
    path = label if isinstance(source, Adapter) else str(source)
    if base is not None:
        warn_of_base(path, adapter, base)
    # The findings about an object were told when it was read.
    if not isinstance(source, Adapter):
        applied = DIFFERENCES | ({DORA} if magnitudes(adapter) else set()) if applies_all else frozenset()
        tell_findings(path, adapter.findings, without=applied)
    return adapter


def load_source(source: AdapterSource, reading: Reading, *, base: ModelPath | None = None, strict: bool) -> Adapter:
    """Read the adapter that a verb was given, without messages.

    If ``strict`` is false, an adapter whose numbers would be wrong is not refused: its findings say so.
    """
    if isinstance(source, Adapter):
        check_unread(reading)
        return source
    return load(source, base=base, strict=strict, **reading.stated)


def only_modules(adapter: Adapter, globs: Sequence[str]) -> Adapter:
    """The adapter with only the modules that match, and the stored tensors that belong to them.

    Without globs all of it stays, also the tensors of modules without a pair (modules_to_save, norms).
    """
    if not globs:
        return adapter
    names = set(select(adapter, globs))
    extra = {key: tensor for key, tensor in adapter.extra.items() if tensor.module in names}
    return replace(adapter, modules={name: adapter[name] for name in names}, extra=extra)


def check_unread(reading: Reading) -> None:
    """Refuse options of reading for an adapter that has already been read.

    They would have no effect, although a caller who gives them expects one.
    """
    for name, value in reading.stated.items():
        raise OptionError(
            f"{name}={value!r} says how to read a file, and this adapter was already read",
            fix=f"give a path, or {name} to loralens.load",
        )


def read_where_unknown(source: AdapterSource, reading: Reading, *, base: ModelPath | None = None) -> Adapter:
    """Read an adapter without messages; ``alpha`` and ``scale`` apply only if the file does not state its own.

    Some of several adapters may be objects, to which the options do not apply, so this is not an error here.
    """
    if isinstance(source, Adapter):
        return source
    # First without them: whether the file states its own scale is known only after reading it.
    unscaled = replace(reading, alpha=None, scale=None)
    source = find_adapter(source)
    adapter = load(source, base=base, **unscaled.stated)
    stated = any(module.scaling.stated for module in adapter.modules.values())
    return adapter if stated else load(source, base=base, **reading.stated)


def command_line_options(reading: Reading) -> str:
    """The options of reading that were given, as a user types them in another command."""
    words: list[str] = []
    for name, value in reading.stated.items():
        words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]  # a flag has no value
    return command_line(*words)


SHOWN = 3  # adapters of a folder that a message names


def with_grids(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters, with the finished runs of a grid in place of its folder.

    Raises
    ------
    OptionError
        No run of the grid is finished.
    """
    members: list[AdapterSource] = []
    for source in adapters:
        runs = [] if isinstance(source, Adapter) else grid_runs(Path(source))
        finished = [str(run) for run in runs if is_finished(run)]
        if runs and not finished:
            raise OptionError(f"{source}: no run of this grid is finished", fix="give the command of the grid again")
        members += finished or [source]
    return members


def with_checkpoints(adapters: Sequence[AdapterSource]) -> list[AdapterSource]:
    """The adapters, each of them once, with the checkpoints of a run, or the runs of a grid, in place of the folder.

    Raises
    ------
    OptionError
        A folder holds several adapters and is not a run.
    """
    # A dict keeps the order. An object has no path, so its identity stands for it.
    members: dict[object, AdapterSource] = {}
    for source in with_grids(adapters):
        if isinstance(source, Adapter):
            members[id(source)] = source
        else:
            members |= {path: path for path in _checkpoints(str(source))}
    return list(members.values())


def _checkpoints(path: str) -> list[str]:
    """The checkpoints of the folder of a run; of any other path the path itself."""
    folder = Path(path)
    # An adapter may lie in one folder with its checkpoints; then the adapter is meant.
    if not folder.is_dir() or _is_adapter(folder):
        return [path]
    try:
        return [str(checkpoint.path) for checkpoint in read_run([folder]).checkpoints]
    except LoraLensError:
        adapters = sorted(entry for entry in folder.iterdir() if _is_adapter(entry))
    # If the path is wrong, the reader reports it, because it knows more.
    if len(adapters) < 2:
        return [path]
    listed = command_line(*map(str, adapters[:SHOWN])) + (" …" if len(adapters) > SHOWN else "")
    raise OptionError(
        f"{path}: is not a training run, and holds {len(adapters)} adapters", fix=f"give each: loralens report {listed}"
    )


def _is_adapter(path: Path) -> bool:
    try:
        return (path.is_dir() or path.suffix in SUFFIXES) and bool(find_adapter(path))
    except LoraLensError:
        return False


Weight = float | Mapping[str, float] | Strength  # a mapping: glob over modules → weight; 1 if none matches
Pair = tuple[AdapterSource, float]
# What Python may be given in place of ADAPTER:WEIGHT: one adapter, a pair, several of both, or a mapping.
Weighted = AdapterSource | Pair | Sequence[AdapterSource | Pair] | Mapping[Any, float]
StrengthPair = tuple[AdapterSource, Weight]
WithStrength = AdapterSource | StrengthPair | Sequence[AdapterSource | StrengthPair] | Mapping[Any, Weight]


def weighted_sources(adapters: Iterable[Weighted]) -> list[Pair]:
    """The adapters of ``verb("a", ("b", 0.3))``, ``verb(["a", "b"])`` and ``verb({"a": 0.7, "b": 0.3})`` with weights.

    An adapter without a weight has the weight 1.

    Raises
    ------
    OptionError
        There is no adapter, an argument is neither a path nor an adapter, or a weight is not a finite number.
    """
    return [(adapter, _finite(weight, adapter)) for adapter, weight in _sources_and_weights(adapters)]


@contextmanager
def name_damaged(adapters: Sequence[tuple[str, Adapter]]) -> Iterator[None]:
    """Add to an error of the block about NaN or Inf in a factor the adapters that hold such numbers in that module.

    Where several adapters are added up, the code that meets such a number knows the module only.
    """
    try:
        yield
    except FormatError as error:
        if error.what != NOT_FINITE:
            raise
        from loralens.analysis.inspection import holds_non_finite  # nothing else here needs it

        places = error.where

        def is_damaged(adapter: Adapter) -> bool:
            named = [module for name, module in adapter.modules.items() if name in places]
            # An adapter may spell the module in another way. Then all of its modules are looked through.
            return any(map(holds_non_finite, named or adapter.modules.values()))

        if damaged := [label for label, adapter in adapters if is_damaged(adapter)]:
            error.at(", ".join(damaged))
        raise


def weighted_label(label: str, weight: float) -> str:
    """An adapter in a sentence: ``chat``, or ``0.7 × chat``."""
    return label if weight == 1 else f"{number(weight, 6)} × {label}"


def sources_with_strengths(adapters: Iterable[WithStrength]) -> list[tuple[AdapterSource, Strength]]:
    """As `weighted_sources`, where a weight may also be a mapping of globs over modules: ``("b", {"v_proj": 0.3})``."""
    return [(adapter, _as_strength(weight, adapter)) for adapter, weight in _sources_and_weights(adapters)]


def strength_within(modules: Sequence[str], weight: float, *, elsewhere: float) -> Strength:
    """``weight`` in the modules of these globs and ``elsewhere`` in others; without globs ``weight`` in all modules."""
    return Strength(elsewhere, dict.fromkeys(modules, float(weight))) if modules else Strength(float(weight), {})


def ingredients(pairs: Sequence[tuple[AdapterSource, Strength]]) -> tuple[Ingredient, ...]:
    """The adapters of a recipe, named by their paths; objects are numbered."""
    names = labels([source for source, _ in pairs])
    return tuple(Ingredient(name, strength) for name, (_, strength) in zip(names, pairs, strict=True))


def label_of_taken(take: AdapterSource | None, pairs: Sequence[tuple[AdapterSource, Strength]]) -> str | None:
    """The name in a recipe of the adapter whose full tensors are used: as it was given, or the number of an object."""
    if not isinstance(take, Adapter):
        return None if take is None else str(take)
    # An object has no name, so it is found by identity.
    for number_of, (source, _) in enumerate(pairs, start=1):
        if source is take:
            return str(number_of)
    raise OptionError("take is an adapter that is not among those combined", fix="give one of them, or 'none'")


def _sources_and_weights(adapters: Iterable[Any]) -> list[tuple[AdapterSource, Any]]:
    pairs = [pair for source in adapters for pair in _as_pairs(source)]
    return list(zip(sources([[adapter for adapter, _ in pairs]]), [weight for _, weight in pairs], strict=True))


def _as_pairs(source: Any) -> list[tuple[Any, Any]]:
    if isinstance(source, Mapping):
        return list(source.items())
    # A tuple of two adapters is a sequence of them; a tuple whose second part is a weight is a pair.
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[1], Real | Mapping | Strength):
        return [source]
    if isinstance(source, str | PathLike | Adapter) or not isinstance(source, Iterable):
        return [(source, 1.0)]
    return [pair for part in source for pair in _as_pairs(part)]


def _as_strength(weight: Any, adapter: AdapterSource) -> Strength:
    """A weight in its general form, with all its numbers checked."""
    if isinstance(weight, Strength):
        base, modules = weight.weight, weight.modules
    else:
        # A mapping alone leaves the weight of other modules at 1, as in a recipe.
        base, modules = (1.0, weight) if isinstance(weight, Mapping) else (weight, {})
    return Strength(_finite(base, adapter), {glob: _finite(number, adapter) for glob, number in modules.items()})


def _finite(weight: Any, adapter: AdapterSource) -> float:
    if not isinstance(weight, Real) or not isfinite(weight):
        whose = "a weight" if isinstance(adapter, Adapter) else f"{adapter}: the weight"
        raise OptionError(f"{whose} cannot be {weight!r}", fix="give a finite number")
    return float(weight)


# In both cases a warning and not an error: a copy of a base may have any name, and only the user knows.
FIX = "give the base that it was trained on; a copy of it under another name is fine"
OF_ONE = "take adapters of one base: an update has a meaning only for the weights that it was trained on"

Held = TypeVar("Held")  # tensors, or their shapes


def read_checkpoint(base: ModelPath) -> "Checkpoint":
    """Open the checkpoint at ``base``; messages say what its reader noticed."""
    from loralens.formats.models.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(base)
    for finding in checkpoint.notes:
        tell(finding.level, f"{base}: {finding.text}")
    return checkpoint


def with_tied_head(stored: Mapping[str, Held], base: ModelPath) -> Mapping[str, Held]:
    """The tensors or shapes of the base, with those of the embedding in place of a head that it does not store."""
    from loralens.formats.models.checkpoint import model_config
    from loralens.merging.planning import find_ties

    return find_ties(stored, model_config(base) or {}).with_copies(stored)


def base_weights(base: ModelPath, modules: "Updates") -> "Weights":
    """The weights of the base that these modules adapt; errors name the base.

    A head that the base does not store has the weight of the embedding, which it shares.
    """
    from loralens.core.weights import weights_of

    checkpoint = read_checkpoint(base)
    with place(base):
        return weights_of(modules, with_tied_head(checkpoint.tensors, base), conv1d=checkpoint.conv1d)


def base_model_of(adapter: Adapter) -> BaseModel:
    """The base that an adapter names, with its sizes if this machine has it."""
    return base_model_named(adapter.base_model or "")


def base_model_named(name: str) -> BaseModel:
    """The base of this name, with its sizes if this machine has it."""
    folder = known_folder(name)
    if folder is None:
        return BaseModel.of(name)
    from loralens.formats.models.checkpoint import model_config

    try:
        config = model_config(folder)
    except LoraLensError:  # a fault of a model that the user did not name is not an error of this command
        config = None
    return BaseModel.of(name, config)


def base_model_at(base: ModelPath) -> BaseModel:
    """The base that a user gave, under its path and the names in its configuration."""
    from loralens.formats.models.checkpoint import model_config

    if isinstance(base, ModelInMemory):
        return BaseModel.of(base.name, base.config)
    path = Path(base)
    name = str(path.resolve()) if path.exists() else str(base)  # what exists is a path, even if it looks like a Hub id
    return BaseModel.of(name, model_config(path))


def base_contradiction(adapter: Adapter, base: ModelPath) -> str:
    """The contradiction between ``base`` and the base that the adapter names, in words; empty if there is none."""
    # An adapter that names no base contradicts none.
    if not adapter.base_model:
        return ""
    why = contradiction(base_model_of(adapter), base_model_at(base))
    return f"it names {adapter.base_model} as its base, and {base} is another: {why}" if why else ""


def warn_of_base(path: str, adapter: Adapter, base: ModelPath) -> None:
    """Warn if ``base`` is not the base that the adapter names."""
    reason = base_contradiction(adapter, base)
    if reason:
        warn(f"{path}: {reason}", FIX)


def warn_of_bases(labels: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Warn if adapters name different bases, or have different sizes."""
    names = {adapter.base_model or "" for adapter in adapters}
    # One name is one base, whatever its configuration says. Then the search for it on this machine, which takes longer
    # than reading a small adapter, is not needed.
    models = [BaseModel.of(name) for name in names] * len(adapters) if len(names) == 1 else map(base_model_of, adapters)
    difference = find_contradiction(list(labels), list(adapters), list(models))
    if difference:
        warn(difference, OF_ONE)


def consult(
    consumer: "Consumer",
    source: AdapterSource,
    adapter: Adapter,
    *,
    match: "Match | None" = None,
    stored: "Mapping[str, Shape] | None" = None,
    base: ModelPath | None = None,
) -> list[Finding]:
    """What a program rejects or applies differently, with what is known of the base and of the files beside a source.

    ``stored`` has the shapes of the tensors of the base, and ``match`` how the names of the adapter match them.
    """
    # The rules take long to import, and most adapters are read without one.
    from loralens.analysis.clients import check

    architecture = None
    if base is not None:
        from loralens.formats.models.checkpoint import model_config

        architecture = (model_config(base) or {}).get("model_type")
    added: list[int] = []
    file = None if isinstance(source, Adapter) else find_adapter(source).file.parent / "added_tokens.json"
    if file is not None and file.is_file():
        added = [token for token in read_json(file).values() if type(token) is int]
    return check(adapter, consumer, match, stored, architecture=architecture, added_tokens=added)
