"""The verb ``convert``: writes an adapter in another dialect, under other names, or in another dtype."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast, get_args

from loralens.choices import FLOAT_TYPES, TARGET_FORMATS, Server, TargetFormat
from loralens.compression.loss import losses, total_error
from loralens.core.adapter import Adapter
from loralens.core.matching import Match, Shape, match
from loralens.core.messages import warn
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import some
from loralens.core.structured import Structured, Update
from loralens.core.threads import processor_count
from loralens.core.together import NORMS
from loralens.core.weights import with_kernels
from loralens.errors import OptionError, place
from loralens.exports import takes_options
from loralens.formats.dialects import conversion_record
from loralens.formats.dialects.dialect_table import FORMATS, GGUF
from loralens.formats.dialects.expert_layouts import OF_IMAGE_MODELS, fit_to_dialect
from loralens.formats.files.container import Stored
from loralens.formats.models.base_copies import FULL, drop_copies
from loralens.formats.models.checkpoint import model_config, open_checkpoint, shapes, weights
from loralens.tables.numbers import count, number, percent
from loralens.tables.table import Column, Columns, Keys, Table, label_column, shape_columns
from loralens.verbs.batches.batch import BatchResult, in_batches
from loralens.verbs.files.output import (
    OutputFormat,
    RoundingCost,
    Target,
    Writing,
    Written,
    check_known,
    round_factors,
)
from loralens.verbs.shared.adapters import Source, base_weights, find_source, read_adapter
from loralens.verbs.shared.options import Reading, check_choice, numpy_dtype

NamedModule = tuple[str, Update]


COLUMNS: Columns[NamedModule] = (
    label_column("name", "module", "0"),
    *shape_columns("1.shape", "out × in"),
    Column("rank", "1.rank", "r", priority=7),
    Column("scale", "1.scale", "scale", number, priority=2),
)


@dataclass(frozen=True, slots=True, repr=False)
class ConvertResult(Written):
    """An adapter in another dialect, and the errors of the conversion.

    Attributes
    ----------
    source : str
        The path of the adapter, or the name of an object in messages.
    adapter : Adapter
        The adapter as it is read from the new file, or would be read.
    format : str
        The new dialect.
    modules : int
        The number of modules that were converted. A dialect may store several of them as one.
    notes : list of str
        Remarks for the user: what was renamed, and what was left out.
    truncation : float
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F over all modules; the part that ``rank`` left out of modules that were not pairs.
    rounding : RoundingCost
        The error of fewer bits, and of scales that were folded into factors.
    rank : int or None
        The rank that was asked for, for modules that were not pairs.
    format_before : str
        The dialect of the source.
    unmapped : tuple of str
        Names of modules in the new file that no program is known to load.
    """

    source: str
    adapter: Adapter
    format: str
    target: Target
    modules: int
    parameters: int
    notes: list[str]
    truncation: float
    rounding: RoundingCost
    rank: int | None = None
    format_before: str = ""
    unmapped: tuple[str, ...] = ()

    def numbers(self) -> dict[str, Any]:
        """What matters of this adapter among several, as JSON values."""
        return {
            "modules": self.modules,
            "format_before": self.format_before,
            "format": self.format,
            "truncation": self.truncation,
            "rounding": self.rounding.total,
        }

    def listing(self) -> list[Table[NamedModule]]:
        """The modules as the new file has them."""
        return [Table(f"{self.source} as {self.format}", COLUMNS, list(self.adapter.items()))]

    def conclusion(self) -> list[str]:
        """The new dialect, and how much of the update is lost on the way."""
        losses = {f"by rank {self.rank}": self.truncation, "by rounding": self.rounding.total}
        lost = [f"{percent(loss)} of the update lost {reason}" for reason, loss in losses.items() if loss]
        # A number that no program reads is lost as well.
        unmapped = f"{count(len(self.unmapped), 'name')} that no program is known to load"
        loss = " and ".join(lost) or (unmapped if self.unmapped else "without loss")
        what = f"{self.source} as {self.format}, {count(self.modules, 'module')}, {loss}"
        return [self.target.conclusion(what)]

    def sentences(self) -> list[str]:
        """The notes, and the errors."""
        lines = list(self.notes)
        if self.unmapped:
            lines.append(_about_unmapped(self.format, self.unmapped))
        if self.rank:
            what = f"over all modules: what rank {self.rank} leaves out"
            lines.append(f"truncation  ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.truncation)} {what}")
        if self.rounding.worst:
            lines.append(str(self.rounding))
        return lines

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "source",
            # also in a dry run
            Column("target", "target.output"),
            "format",
            "notes",
            "modules",
            "parameters",
            "truncation",
            "rounding",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertWriting(Writing):
    """Writing: where the adapter is written, and for which dialect or server.

    Parameters
    ----------
    to : str, optional
        The dialect to write, or the server that shall take the file. [default: the dialect of the source]
    """

    # Wider than in other verbs, none of which reads it before `convert` has replaced a server by its dialect.
    to: TargetFormat | Server | None = None  # type: ignore[assignment]

    def check(self) -> None:
        """Refuse an unknown dialect, server or dtype before anything is read."""
        check_choice("to", self.to, (*TARGET_FORMATS, *get_args(Server)))
        check_choice("dtype", self.dtype, FLOAT_TYPES)


CHANGES = ("to", "dtype", "prefix", "rank", "drop_extra")  # the options that say what changes


def _check_change(options: Mapping[str, Any]) -> None:
    """Refuse an unknown dialect or dtype, and options that ask for no change, before anything is read."""
    ConvertWriting(to=options.get("to"), dtype=options.get("dtype")).check()
    # `rank` 0 is refused with a message of its own.
    if not any(options.get(name) not in (None, False, (), [], {}) for name in CHANGES):
        fix = f"give --to ({', '.join(TARGET_FORMATS)}), or --dtype bf16"
        raise OptionError("nothing says what to convert to", fix=fix)


@in_batches(lambda result: {"numbers": result.numbers()}, check=_check_change)
@takes_options
def convert(
    source: Source,
    *,
    arch: str | None = None,
    prefix: Sequence[str] | Mapping[str, str] = (),
    rank: int | None = None,
    drop_extra: bool = False,
    jobs: int | None = None,
    writing: ConvertWriting,
    reading: Reading,
) -> ConvertResult | BatchResult:
    """Write an adapter in another dialect, with its names and scales.

    Scales and names that the target dialect cannot state are recorded in its metadata, so loralens reads its own files
    back without ``base`` or ``alpha``. What the dialect cannot hold is folded into the factors if that is exact;
    otherwise the conversion is refused, and the message names the tensor. The errors of ``rank`` and of rounding are
    reported. The source is never overwritten.

    For a server (vllm, sglang, ollama, tensorrt-llm, lorax) the file has what this server takes: its names, one rank,
    one whole α and no more than its largest rank. What it would refuse or ignore is refused here.

    Several adapters, or a folder of them, are written into the folder OUT, each under its own name. What exists there
    is skipped, unless ``overwrite`` is given.

    Parameters
    ----------
    source : path, Adapter or model, or a list of them
        Several adapters, or a folder that has some in it, give a `BatchResult` with one row for each.
    arch : str, optional
        The architecture that GGUF states, such as llama or qwen2. [default: from ``base``]
    prefix : sequence of str, or mapping of str to str
        Let the names of modules that begin with OLD begin with NEW.

        ``"OLD=NEW"`` or ``{old: new}``.
    rank : int, optional
        The rank of modules that are not a pair of factors yet (LoKr, LoHa, full differences); for a server, the largest
        rank of all modules.
    drop_extra : bool
        Leave out tensors that belong to no pair of factors.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process. [default: 1]
    writing : ConvertWriting
        The options ``output``, ``to``, ``base``, ``dtype``, ``allow_loss``, ``overwrite``, ``dry_run``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        Nothing says what changes, the dialect or the dtype is unknown, no module has the prefix, the target dialect has
        to state a scale that the file does not give, rounding costs too much, or the target exists or overlaps with an
        input.
    FormatError, MismatchError
        The file cannot be read, the target dialect cannot hold something of it, or the base lacks a module.

    Examples
    --------
    $ loralens convert adapter --to kohya -o style.safetensors
    $ loralens convert adapter --to vllm --rank 16 -o served
    """
    del jobs  # one adapter is one job
    _check_change({"to": writing.to, "dtype": writing.dtype, "prefix": prefix, "rank": rank, "drop_extra": drop_extra})
    source, label = find_source(source)
    adapter = read_adapter(source, reading, base=writing.base, label=label)
    format_before = adapter.format
    server = cast("Server", writing.to) if writing.to in get_args(Server) else None
    if server:
        # Imported here, as the rules of all programs take long to import.
        from loralens.verbs.files.servers import check_taken, fit_to_server, target_of

        writing = replace(writing, to=target_of(server))
    with place(label):
        to = writing.form(adapter).name
        if writing.to:
            check_known(adapter, to)
        adapter, notes = with_known_names(adapter, to)
        if writing.base is not None:
            adapter, base_notes = rename_as_in_base(adapter, writing.base, to)
            notes += base_notes
        # Prefixes last, so that OLD may begin a name of the base.
        adapter, magnitude_notes = add_magnitudes(replace_prefixes(adapter, prefix), writing.base)
        notes += magnitude_notes
        # This comes after the magnitudes: those that were just added are left out too if the user wants no extras.
        if drop_extra:
            notes.append(f"left out {len(adapter.extra)} tensors that do not belong to a pair")
            adapter = replace(adapter, extra={})
        if server and to == "peft":
            known = shapes(writing.base) if writing.base is not None else {}
            pairs, truncation, server_notes = fit_to_server(adapter, server, rank=rank, shapes=known)
            notes += server_notes
            rank = max((module.rank for module in pairs.modules.values()), default=0) if truncation else None
        else:
            pairs, truncation = _as_pairs(adapter, rank)
        # The modules of a server may have other names than before.
        narrow = round_factors(pairs, numpy_dtype(writing.dtype), made_from=None if server else adapter)
    writing.check_source(source, base=writing.base)
    with place(label):
        form = OutputFormat.with_base(to, writing.base, arch)
        stored, files = form.encode(narrow)
        # The stored form is read back in memory: the result is what a reader will see, whether it is written or not.
        back = next(each for each in FORMATS if each.name == to).read(stored)
        if to != format_before:
            warn_of_components(back, format_before)
        exact = pairs
        # Another dialect may divide, join and rename modules, and the error is measured under its names.
        if pairs.format != to:
            exact = fit_to_dialect(to, pairs, base_config=form.base_config, arch=form.arch)
            notes += _note_architecture(to, pairs, exact)
        if server:
            check_taken(conversion_record.apply(back, conversion_record.read_record(stored)), server)
        written = _rename_back(exact, back, stored)
        cost = RoundingCost.between(exact, written, allow_loss=writing.allow_loss, dtype=writing.dtype)
        unmapped: list[str] = []
        if to in OF_IMAGE_MODELS and to != format_before:
            from loralens.formats.dialects.image import unmapped_names

            unmapped = unmapped_names(to, pairs, stored.tensors)
    writing.write(stored, files)
    measured = len(adapter), sum(module.parameters for module in narrow.modules.values()), notes, truncation, cost
    # An adapter may have so many modules that one more copy of their objects takes the most memory.
    del adapter, pairs, narrow, exact, written
    # The record in the metadata holds names and scales that the dialect itself cannot state.
    converted = conversion_record.apply(back, conversion_record.read_record(stored))
    return ConvertResult(label, converted, to, writing, *measured, rank, format_before, tuple(unmapped))


def _about_unmapped(to: str, names: Sequence[str]) -> str:
    """What to do with a file of which no program is known to load some names."""
    from loralens.core.image_families import client_versions
    from loralens.formats.dialects.image import CLIENTS

    client, title = CLIENTS[to]
    return (
        f"{title} {client_versions()[client]} is not known to load {some(names, 1)}: they are of no model whose names "
        "loralens has; check that the output changes when the file is loaded"
    )


def _note_architecture(to: str, before: Adapter, after: Adapter) -> list[str]:
    """What was done to the layers of an image model, for the user."""
    if to not in OF_IMAGE_MODELS:
        return []
    from loralens.core.base_model import image_models_of
    from loralens.formats.dialects.image import fit_image

    models = image_models_of(before)
    if not models:
        return []
    # Models whose layers have the same names in the target are no choice.
    written = fit_image(to, before, models[0]).modules.keys()
    others = [one.name for one in models[1:] if fit_image(to, before, one).modules.keys() != written]
    if others:
        warn(
            f"nothing in the file says whether it is of {models[0].name} or of {' or '.join(others)}, which have all "
            f"its modules; it was converted as one of {models[0].name}",
            "if that is wrong, name the base where the file has its metadata (modelspec.architecture, or "
            "base_model_name_or_path in adapter_config.json), and convert it again",
        )
    change = f"; {count(len(before), 'module')} became {len(after)}" if len(before) != len(after) else ""
    if before.modules.keys() == after.modules.keys() and to != "kohya":
        return []
    named = " or ".join(one.name for one in models if one.name not in others)
    return [f"{named}, by the names and shapes of the modules: named as {to} has them{change}"]


def _as_pairs(adapter: Adapter, rank: int | None) -> tuple[Adapter, float]:
    """Replace modules that are not pairs by their nearest pairs of ``rank``, and measure the relative error of all.

    Without a rank the modules stay as they are. A dialect that can only store pairs then refuses them by name.
    """
    if rank is None:
        return adapter, 0.0
    # True is an int for Python, but rank=True is a mistake.
    if isinstance(rank, bool) or not rank >= 1 or int(rank) != rank:
        raise OptionError(f"rank {rank!r} is not a whole number from 1", fix="give a whole number from 1")
    if not any(isinstance(module, Structured) for module in adapter.modules.values()):
        raise OptionError("--rank is for modules that are not pairs yet, and here all are", fix="leave out --rank")

    def pair(module: Update) -> Update:
        # A matrix has at most min(out, in) directions.
        return module.truncated(min(int(rank), *module.shape)) if isinstance(module, Structured) else module

    # Measured over all modules, so that the number is comparable with that of compress.
    pairs = adapter.map(pair)
    return pairs, total_error(losses(adapter, pairs, threads=processor_count()))


def _rename_back(exact: Adapter, back: Adapter, stored: Stored) -> dict[str, Update]:
    """The modules of ``back``, which was read from ``stored``, under the names that they have in ``exact``."""
    names = {name: file for file, name in stored.names.items()}

    def find(name: str, module: Update) -> Update:
        written = back[names.get(name, name)]
        # A dialect that states no scale leaves it to the record in the metadata, which is not applied here.
        return written.rescaled(module.scale, module.scaling) if written.scaling.formula == "unknown" else written

    return {name: find(name, module) for name, module in exact.items()}


def rename_as_in_base(adapter: Adapter, base: ModelPath, to: str) -> tuple[Adapter, list[str]]:
    """The adapter with the names that its modules have in the base, and notes for the user.

    PEFT saves embeddings and heads in full even if they were not trained. If the dialect ``to`` has no place for such
    tensors, those that equal the base's own are left out.

    Raises
    ------
    MismatchError
        Some module has no weight in the base, or the dialect cannot adapt a head that shares the embedding's weight.
    """
    base_shapes = shapes(base)
    tied = _tied_heads(adapter, base, base_shapes)
    # llama.cpp has no output tensor of its own for such a model, so there is nothing that the pair could adapt.
    if tied and to == GGUF:
        with place(next(iter(tied))):
            from loralens.formats.dialects.gguf import tied_head_error

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


def _tied_heads(adapter: Adapter, base: ModelPath, base_shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Module → name of the head, for modules that adapt a head whose weight the base stores only as its embedding."""
    # Checked first, since looking for ties opens the files of the base.
    if all(f"{name}.weight" in base_shapes for name in adapter):
        return {}
    from loralens.merging.planning import Tied

    tied = Tied.of(open_checkpoint(base).files.tensors, model_config(base) or {})
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


def add_magnitudes(adapter: Adapter, base: ModelPath | None) -> tuple[Adapter, list[str]]:
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
    """An adapter of kohya or ComfyUI with the names that programs have, if its file has others, and notes for the user.

    Adapters that come from or go to another dialect stay as they are, since writers give new names. If all names are
    right, the modules stay as they were read. Names of a model that is not known here stay too, with a warning if
    neither program has them.
    """
    if to == adapter.format == "comfyui":
        return _with_names_of_comfyui(adapter)
    if not to == adapter.format == "kohya":
        return adapter, []
    # Imported here, since most conversions are of other dialects.
    from loralens.core.image_names import comfyui_has, sd_scripts_has
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
            "rename them: --prefix OLD=NEW. Only those of the models in docs/formats.md are known without it",
        )
    return adapter, []


def _with_names_of_comfyui(adapter: Adapter) -> tuple[Adapter, list[str]]:
    """The adapter with names that ComfyUI maps, if it is of a family that is known and its file has others."""
    # Imported here, since most conversions are of other dialects.
    from loralens.formats.dialects.image import fit_image, unmapped_names

    keys = [key for module in adapter.modules.values() if module.origin for key in module.origin.tensors]
    lost = unmapped_names("comfyui", adapter, keys)
    fitted = fit_image("comfyui", adapter.map(lambda module: module.without_origin())) if lost else adapter
    if fitted.modules.keys() == adapter.modules.keys():
        return adapter, []
    return fitted, [f"{len(lost)} of {len(adapter)} modules got the names that ComfyUI has; the first was {lost[0]}"]


def warn_of_components(adapter: Adapter, format_before: str) -> None:
    """Warn that diffusers or PEFT loads nothing of a file, as its names have no component, or one too many."""
    if adapter.format not in ("diffusers", "peft"):
        return
    from loralens.formats.dialects.diffusers import component  # for these dialects only

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
