"""The verb ``inspect``: shows what is in an adapter file, and how it was understood."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from loralens.analysis.inspection import Inspection, inspect_adapter
from loralens.choices import Consumer, Level
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import block, kind, natural_key, some
from loralens.core.structured import Update
from loralens.errors import MismatchError, place
from loralens.exports import takes_options
from loralens.formats.records.training_notes import Folder, TrainingNotes
from loralens.tables.numbers import count, join_words, number, shape, size, span
from loralens.tables.result import ResultOfSeveral, Tabular
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key, shape_columns
from loralens.verbs.shared.adapters import AdapterSource, Source, consult, labels, load_source, sources
from loralens.verbs.shared.options import ModuleChoice, Reading, check_choice

if TYPE_CHECKING:
    from loralens.analysis.clients import Client

SCALES_NAMED = 5  # scales of one adapter, the most frequent ones, that its facts list; --json has every module's


class ModuleInspection(NamedTuple):
    """One row: a module of an adapter, and whether its ΔW is 0."""

    path: str
    name: str
    module: Update
    zero: bool


class Kind(NamedTuple):
    """One row: the modules of one kind, weight, shape, rank, scale and dtype.

    ``module`` is any of them, for what they have in common.
    """

    kind: str
    weight: str
    module: Update
    names: Sequence[str]
    parameters: int


@dataclass(frozen=True, slots=True, repr=False)
class AdapterInspection(Tabular):
    """The contents of one adapter.

    Attributes
    ----------
    path : str
        The label of the adapter: its path, if it was read from a file.
    inspection : Inspection
        Its modules, other tensors, and modules with ΔW = 0.
    findings : sequence of Finding
        The findings of the reader, about the numbers, about how the names match the base, and about the consumer.
    refusals : sequence of Finding
        The findings about the consumer alone: what it rejects, ignores or applies in another way.
    consumer : str or None
        The program whose rules were applied.
    """

    path: str
    inspection: Inspection
    findings: Sequence[Finding]
    refusals: Sequence[Finding] = ()
    consumer: Consumer | None = None

    @property
    def wrong(self) -> bool:
        """Whether there is an error among the findings, whatever it is about."""
        return any(finding.level == "error" for finding in self.findings)

    @property
    def adapter(self) -> Adapter:
        """The adapter that was inspected."""
        return self.inspection.adapter

    @property
    def modules(self) -> Mapping[str, Update]:
        """The requested modules, in natural order."""
        return self.inspection.modules

    @property
    def training(self) -> TrainingNotes | None:
        """What the metadata of an image model's adapter say about its training; None if they say nothing."""
        return TrainingNotes.of(self.adapter.metadata)

    def tables(self) -> list[Table[Any]]:
        """The adapter as a whole, its modules by kind, and the tensors that belong to no pair."""
        return [
            Table("as a whole", FACT_COLUMNS, _facts(self.inspection), whole=True),
            Table("training, as the file says", FACT_COLUMNS, training_facts(self.training)),
            Table("modules", KIND_COLUMNS, _kinds(self.modules)),
            Table("not part of a pair, kept unchanged", EXTRA_COLUMNS, list(self.inspection.extra.items())),
        ]

    def conclusion(self) -> list[str]:
        """What the adapter is, and whether anything in it looks wrong."""
        adapter, modules = self.adapter, self.modules
        ranks = span([module.rank for module in modules.values()])
        base = f", for {_base_and_family(adapter)}"
        what = f"{self.path}: {adapter.format} adapter of rank {ranks} in {count(len(modules), 'module')}{base}"
        levels = Counter(finding.level for finding in self.findings)
        counts = [count(levels[level], level) for level in get_args(Level) if levels[level]]
        # A note does not mean that something is wrong; notes are listed below.
        codes = list(dict.fromkeys(finding.words for finding in self.findings if finding.level != "note"))
        verdict = f"{join_words(counts)}: {some(codes)}" if codes else "Nothing in it looks wrong"
        notes = self.training
        words = [f"Trigger words: {some(notes.trigger_words)}."] if notes and notes.trigger_words else []
        return [f"{what}.", *words, *self._on_consumer(), f"{verdict}."]

    def _on_consumer(self) -> list[str]:
        if self.consumer is None:
            return []
        if any(finding.level == "error" for finding in self.refusals):
            return [f"{self.consumer} rejects it, or applies it in another way than it was trained."]
        if self.wrong:
            return [f"{self.consumer} cannot apply it as it was trained, because of the errors in the adapter itself."]
        return [f"{self.consumer} applies it as it was trained."]

    def listing(self) -> list[Table[ModuleInspection]]:
        """All modules, one module per row."""
        zero = set(self.inspection.zero)  # a set: a model has thousands of modules
        rows = [ModuleInspection(self.path, name, module, name in zero) for name, module in self.modules.items()]
        return [Table(self.path, MODULE_COLUMNS, rows)]

    def sentences(self) -> list[str]:
        """The findings, each with its remedy on the next line."""
        return [
            line
            for finding in self.findings
            # The remedy has a line of its own, so that a command in it can be copied.
            for line in (f"{finding.level}: {finding.text}", *([f"  fix: {finding.fix}"] if finding.fix else []))
        ]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "path",
            Column("format", "adapter.format"),
            Column("base_model", "adapter.base_model"),
            rows_key("modules", MODULE_COLUMNS, ModuleInspection, "listing.0"),
            rows_key("extra", EXTRA_COLUMNS, source=lambda result: list(result.inspection.extra.items())),
            Column("metadata", "adapter.metadata"),
            "training",
            "findings",
            Column(("total", "modules"), "inspection.modules.len", type=int),
            Column(("total", "parameters"), "inspection.parameters"),
            Column(("total", "bytes"), "inspection.nbytes"),
            Column(("total", "extra_bytes"), lambda result: _extra_bytes(result.inspection), type=int),
        )


@dataclass(frozen=True, slots=True, repr=False)
class InspectResult(ResultOfSeveral):
    """The contents of adapters.

    Attributes
    ----------
    consumer : str or None
        The program whose rules were applied.
    """

    adapters: Sequence[AdapterInspection]
    consumer: Consumer | None = None

    @property
    def answer(self) -> bool | None:
        """Whether the consumer applies every adapter as it was trained.

        Without a consumer it is false if there is an error, else None.
        """
        # An error of the file itself counts too: no program applies an adapter with wrong numbers, or to another base.
        wrong = any(adapter.wrong for adapter in self.adapters)
        return not wrong if wrong or self.consumer else None

    @property
    def findings(self) -> list[Finding]:
        """The findings of all adapters."""
        return [finding for adapter in self.adapters for finding in adapter.findings]


@dataclass(frozen=True, slots=True, repr=False)
class Consumers(Tabular):
    """The programs whose rules are known: the dialects that they read, and the versions that were read."""

    rows: "Sequence[tuple[Consumer, Client]]"

    def tables(self) -> list[Table[Any]]:
        """One row for each program."""
        return [Table("programs", CONSUMER_COLUMNS, self.rows)]

    def conclusion(self) -> list[str]:
        """How to ask about one of them."""
        return [f"The rules of {len(self.rows)} programs are known: inspect ADAPTER --for NAME applies them."]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (rows_key("programs", CONSUMER_COLUMNS, source=lambda result: list(result.rows)),)


def list_consumers() -> Consumers:
    """The programs whose rules are known, which `inspect`, `doctor` and `convert` share."""
    from loralens.analysis.clients import CLIENTS  # most adapters are inspected without one

    return Consumers(list(CLIENTS.items()))


CONSUMER_COLUMNS: Columns[tuple[Any, Any]] = (
    label_column("name", "name", "0"),
    Column("title", "1.title", type=str),
    Column("reads", lambda row: " ".join(row[1].reads), "reads", align="left", priority=6, type=str),
    Column("version", "1.version", "read from", align="left", priority=8, type=str),
    Column("target", "1.target", "--to writes", align="left", priority=5, type=str),
)
MODULE_COLUMNS: Columns[ModuleInspection] = (
    Column("path", "path", json=False),
    label_column("name", "module"),
    Column("kind", "module.layout.kind", "weight", align="left"),
    *shape_columns("module.shape", "out × in"),
    Column("rank", "module.rank", "r", priority=7),
    Column("scale", "module.scale", "scale", number, priority=6),
    Column("scale_source", "module.scaling"),  # a wrong scale mostly comes from a wrong source
    Column("dtype", "module.dtype", "dtype", priority=2, type=str),
    Column("parameters", "module.parameters", "parameters", "{:,}".format, priority=4),
    Column("bytes", "module.nbytes"),
    Column("zero"),
)
# Facts are rows of two columns, so that they are aligned by the same code as all other tables.
FACT_COLUMNS: Columns[tuple[str, str]] = (
    label_column("property", " ", "0"),  # blank, as facts need no heading
    label_column("value", " ", "1", sentence=True),
)
# On a narrow terminal the kind of the weight is left out first, as nearly all are linear; the rank is never left out.
KIND_COLUMNS: Columns[Kind] = (
    label_column("kind", "kind"),
    Column("modules", "names.len", "modules", priority=8),
    Column("blocks", lambda row: _block_ranges(row.names), "blocks", align="left", priority=3),
    Column("weight", "weight", "weight", align="left", priority=2),
    Column("shape", "module.shape", "out × in", shape, priority=5),
    Column("rank", "module.rank", "r", priority=ALWAYS),
    Column("scale", "module.scale", "scale", number, priority=7),
    Column("dtype", "module.dtype", "dtype", priority=4),
    Column("parameters", "parameters", "parameters", "{:,}".format, priority=6, matters="largest"),
)
EXTRA_COLUMNS: Columns[tuple[str, Extra]] = (
    label_column("key", "key", "0"),
    label_column("role", "role", "1.role"),
    Column("module", "1.module", type=str | None),
    Column("shape", "1.tensor.shape", "shape", shape, priority=3),
    Column("dtype", "1.tensor.dtype", "dtype", priority=2, type=str),
    Column("bytes", "1.tensor.nbytes", "size", size, priority=4),
)


def _facts(inspection: Inspection) -> list[tuple[str, str]]:
    """The properties of the adapter as a whole, and their values."""
    modules = inspection.modules
    ranks = Counter(module.rank for module in modules.values())
    scales = Counter((module.scale, str(module.scaling)) for module in modules.values())
    named = [(f"{number(scale, 6)}, {source}", of) for (scale, source), of in scales.most_common(SCALES_NAMED)]
    # Format, base and modules stand in the conclusion, and so does the rank unless modules differ in it.
    several = [("rank", _count_names([(str(rank), of) for rank, of in sorted(ranks.items())]))]
    facts = [
        *(several if len(ranks) > 1 else []),
        ("scale", _count_names(named)),
        ("size", f"{inspection.parameters:,} parameters in pairs, {size(inspection.nbytes)}"),
    ]
    if inspection.extra:  # no line for what nearly all adapters lack
        facts.append(("besides", f"{len(inspection.extra)} other tensors, {size(_extra_bytes(inspection))}"))
    return facts


def _extra_bytes(inspection: Inspection) -> int:
    return sum(extra.tensor.nbytes for extra in inspection.extra.values())


def _count_names(counts: Sequence[tuple[str, int]]) -> str:
    """Values with the number of modules that have them; a value that all modules have stands alone."""
    if len(counts) == 1:
        return counts[0][0]
    return "; ".join(f"{text} ({count(number, 'module')})" for text, number in counts)


def _kinds(modules: Mapping[str, Update]) -> list[Kind]:
    """The modules grouped by kind, and by everything else that their common row says."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, module in modules.items():
        layout = module.layout
        weight = layout.kind + (" transposed" if layout.transposed else "")
        # The scale as it is shown: scales that differ by rounding would else make rows that look alike.
        key = (kind(name), weight, module.shape, module.rank, number(module.scale), str(module.dtype))
        groups.setdefault(key, []).append(name)
    return [
        Kind(key[0], key[1], modules[names[0]], names, sum(modules[name].parameters for name in names))
        for key, names in sorted(groups.items(), key=lambda item: natural_key(item[0][0]))
    ]


def _block_ranges(names: Sequence[str]) -> str:
    """The numbers of blocks as ranges: ``0–3 7 9–11``; of several stacks ``down_blocks 0–2, up_blocks 1–3``."""
    stacks: dict[str, set[int]] = {}
    for numbered in map(block, names):
        if numbered:
            stacks.setdefault(numbered.stack, set()).add(numbered.number)
    ranges = {}
    for stack, numbers in stacks.items():
        # Consecutive numbers have the same difference from their indices in the sorted list.
        runs = groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
        ranges[stack] = " ".join(span([number for _, number in run]) for _, run in runs)
    # A model with one stack needs no name for it.
    return "".join(ranges.values()) if len(ranges) == 1 else ", ".join(f"{stack} {r}" for stack, r in ranges.items())


@takes_options
def inspect(
    *adapters: Source,
    base: ModelPath | None = None,
    consumer: Consumer | None = None,
    selection: ModuleChoice,
    reading: Reading,
) -> InspectResult:
    """Show what is in an adapter file: format, base, modules, scales and their source, other tensors, warnings.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache.

    Parameters
    ----------
    *adapters : path, Adapter or model
        Files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load` returns.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Say how the names match
        its weights, of which only headers are read.
    consumer : str, optional
        Say what this program rejects or ignores; ``list`` lists the programs. With any error the exit code is 1.

        `list_consumers` lists them in Python.
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        A glob that matches nothing; an unknown consumer.
    FormatError
        A file that is not an adapter. What is wrong with an adapter is a finding.

    Examples
    --------
    $ loralens inspect adapter
    $ loralens inspect adapter --for vllm
    """
    modules = selection.globs
    check_choice("consumer", consumer, get_args(Consumer))
    chosen = sources(adapters)
    inspected = []
    for source, label in zip(chosen, labels(chosen), strict=True):
        # An adapter with wrong numbers is shown with findings instead of refused.
        adapter = load_source(source, reading, base=base, strict=False)
        with place(label):
            inspected.append(_inspect(label, source, adapter, modules, base, consumer))
    return InspectResult(inspected, consumer)


def _inspect(
    label: str,
    source: AdapterSource,
    adapter: Adapter,
    modules: Sequence[str],
    base: ModelPath | None,
    consumer: Consumer | None,
) -> AdapterInspection:
    inspection = inspect_adapter(adapter, modules=modules)
    findings, match = list(inspection.findings), None
    stored: Mapping[str, tuple[int, ...]] = {}
    if base is not None:
        # Imported here because it takes as long as NumPy itself, and most adapters are inspected without a base.
        from loralens.core.matching import match as match_names
        from loralens.formats.models.checkpoint import shapes
        from loralens.verbs.shared.adapters import FIX, base_contradiction, with_tied_head

        # Only shapes are read, which are in the headers.
        stored = with_tied_head(shapes(base), base)
        try:
            match = match_names({name: module.shape for name, module in inspection.modules.items()}, stored)
            findings.append(Finding("note", "names", f"against {base}: {match}"))
        except MismatchError as error:  # a finding, as the rest of the adapter can still be shown
            findings.append(Finding("error", "names", f"against {base}: {error.what}", error.fix))
        contradiction = base_contradiction(adapter, base)
        if contradiction:
            findings.append(Finding("warning", "base-differs", contradiction, FIX))
    # Last, because a consumer also refuses what does not match the base.
    refusals: list[Finding] = []
    if consumer is not None:
        refusals = consult(consumer, source, adapter, match=match, stored=stored, base=base)
        # What the reader already said about this consumer is said once, at the level that it has for the consumer.
        said = {finding.text for finding in refusals}
        findings = [finding for finding in findings if finding.text not in said]
    # Of a file of PEFT without its configuration the reader says that α is unknown.
    elif not modules and (adapter.format != "peft" or adapter.config is not None):
        from loralens.analysis.clients import applied_by

        # As in the table of a folder. The user named no program, so it is no error that all refuse.
        _, refusal = applied_by(adapter)
        if refusal and refusal.text not in {finding.text for finding in findings}:
            findings.append(replace(refusal, level="warning"))
    return AdapterInspection(label, inspection, [*findings, *refusals], refusals, consumer)


TAGS_NAMED = 12  # tags of captions, and folders of images, that are listed
TAGS_IN_ROW = 3


def training_facts(notes: TrainingNotes | None) -> list[tuple[str, str]]:
    """What the metadata say about the training, one property a row."""
    if notes is None:
        return []
    # The trigger words stand in the conclusion.
    facts = [*((name.replace("_", " "), value) for name, value in notes.values.items())]
    if notes.folders:
        facts.append(("folders", "; ".join(map(_folder_text, notes.folders[:TAGS_NAMED]))))
    listed = [f"{tag.tag} ({tag.images})" for tag in notes.tags[:TAGS_NAMED]]
    if notes.tag_count > TAGS_NAMED:
        listed.append(f"and {notes.tag_count - TAGS_NAMED:,} more")
    # A few on each row, so that none is shortened on a narrow terminal.
    rows = [", ".join(listed[i : i + TAGS_IN_ROW]) for i in range(0, len(listed), TAGS_IN_ROW)]
    return facts + [("" if i else "tags", row) for i, row in enumerate(rows)]


def _folder_text(folder: Folder) -> str:
    images = "" if folder.images is None else f": {count(folder.images, 'image')}"
    return folder.name + images + (f" × {folder.repeats}" if images and folder.repeats else "")


def _base_and_family(adapter: Adapter) -> str:
    """The base that an adapter names, and the family of image models to which its modules belong."""
    if not adapter.base_model:
        return base_by_shapes(adapter)
    family = ""
    # Imported here, since most adapters are those of language models.
    if adapter.format not in ("peft", "mlx", "gguf", "loralib"):
        from loralens.core.base_model import image_models_of

        family = " or ".join(model.name for model in image_models_of(adapter))
    return f"{adapter.base_model} ({family})" if family else adapter.base_model


def base_by_shapes(adapter: Adapter) -> str:
    """The base of an adapter that does not name it, in the conclusion: the image models that have its modules."""
    # Imported here, since most adapters name their base.
    from loralens.core.base_model import image_models_of
    from loralens.core.image_models import image_models

    models = image_models_of(adapter)
    if not models:
        return "a base that it does not name"
    stated = (adapter.metadata or {}).get("ss_base_model_version", "")
    named = [model for model in image_models() if any(word in stated.lower() for word in model.words)]
    # Some trainers write a version that they copied from a template.
    wrong = f", although its metadata say {stated}" if named and not any(model in models for model in named) else ""
    return f"{' or '.join(model.name for model in models)}, by the names and shapes of its modules{wrong}"
