"""The verb ``doctor``: examines adapters for faults, and says what fixes them."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from loralens.analysis.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.doctor import UNREADABLE, diagnosis_codes, run_checks
from loralens.analysis.loading_checks import CLIENT
from loralens.analysis.strength_checks import SAME_ADAPTER
from loralens.choices import FLOAT_TYPES, Consumer, Level, MergeDType, PredictedRounding
from loralens.core.adapter import Adapter
from loralens.core.matching import match
from loralens.core.model_in_memory import ModelPath
from loralens.core.names import kind
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError, in_shell
from loralens.exports import takes_options
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import read_json
from loralens.formats.files.disk import check_room
from loralens.formats.files.json_text import dumps, is_safe_text
from loralens.formats.files.location import find_adapter
from loralens.formats.models.checkpoint import shapes
from loralens.formats.records.results import check_log_target, write_sarif
from loralens.formats.records.results import sarif as sarif_log
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import Column, Columns, Keys, Table, label_column, rows_key
from loralens.verbs.batches.batch import WORK, AdapterWork, BatchResult, is_several, run_batch
from loralens.verbs.files.output import file_saving
from loralens.verbs.shared.adapters import AdapterSource, Source, consult, labels, load_source, sources, with_tied_head
from loralens.verbs.shared.examination import examine_adapters, open_base
from loralens.verbs.shared.options import ModuleChoice, Reading, check_choice
from loralens.version import __version__

WORST = 3  # modules that the text names for findings with one cause; --verbose and --json list all of them
CODES = 4  # kinds of findings that the conclusion names


@dataclass(frozen=True, slots=True, repr=False)
class DoctorResult(Tabular):
    """The findings about adapters, most serious first; iteration is over the findings.

    Attributes
    ----------
    adapters : mapping of str to Adapter or None
        The adapters by their labels; None if one could not be read.
    base : str or None
        The base model that they were compared with.
    fail_on : str or None
        The least serious level that makes `answer` false; None if no finding does.
    causes_told : int or None
        How many causes the text tells of, the most serious first; None for all.
    modules_told : int or None
        How many modules the text names of each cause; None for all.
    """

    findings: Sequence[Diagnosis]
    adapters: Mapping[str, Adapter | None]
    base: str | None = None
    fail_on: Level | None = None
    causes_told: int | None = None
    modules_told: int | None = WORST

    def __iter__(self) -> Iterator[Diagnosis]:
        return iter(self.findings)

    @property
    def answer(self) -> bool:
        """Whether there is no finding of the level ``fail_on`` or a more serious one; true if no level was given."""
        if self.fail_on is None:
            return True
        return all(LEVELS.index(finding.level) > LEVELS.index(self.fail_on) for finding in self.findings)

    def numbers(self) -> dict[str, Any]:
        """What matters of one adapter among several, as JSON values; causes are counted, as in the text."""
        firsts = [cause[0] for cause in self.causes]
        levels = Counter(first.level for first in firsts)
        read = [adapter for adapter in self.adapters.values() if adapter is not None]
        # Findings that were written earlier do not tell the number of modules.
        return {
            "modules": sum(map(len, read)) if read else None,
            **{f"{level}s": levels[level] for level in LEVELS},
            "codes": list(dict.fromkeys(first.code for first in firsts)),
        }

    def listing(self) -> list[Table[Diagnosis]]:
        """The findings, one row for every module concerned."""
        return [Table("findings", FINDING_COLUMNS, self.findings)]

    @property
    def causes(self) -> list[list[Diagnosis]]:
        """The findings in groups with one cause, most serious first; no group has those of two adapters."""
        groups = [
            group
            for label in self.adapters
            for group in by_cause(finding for finding in self.findings if finding.adapter == label)
        ]
        return sorted(groups, key=lambda group: LEVELS.index(group[0].level))

    def conclusion(self) -> list[str]:
        """Whether anything is wrong: how many causes of which level there are, and of which kinds."""
        (label, *further) = self.adapters
        adapters = f"these {len(self.adapters)} adapters" if further else label
        causes = self.causes
        if not causes:
            return [f"Nothing is wrong with {adapters}, as far as can be seen."]
        # That one adapter is a copy of another is the most important fact about several adapters.
        same = [f"{f.adapter} is {f.evidence}." for f in self.findings if f.evidence.startswith(SAME_ADAPTER)]
        levels = _levels(causes)
        codes = list(dict.fromkeys(cause[0].code for cause in causes))
        named = ", ".join(codes[:CODES]) + (" …" if len(codes) > CODES else "")
        # Notes are not faults, but a newcomer could take a list of them for faults.
        fault = causes[0][0].level != "note"
        sentence = f"{levels} about {adapters}" if fault else f"Nothing is wrong with {adapters}; {levels}"
        return [f"{sentence[0].upper()}{sentence[1:]}: {named}.", *same[:1]]

    def sentences(self) -> list[str]:
        """The findings of every adapter, those with one cause together."""
        shown = self.causes[: self.causes_told]
        lines = [line for label in self.adapters for line in self._adapter_lines(label, shown)]
        hidden = len(self.causes) - len(shown)
        return [*lines, f"{count(hidden, 'more cause')}{in_shell(' (--verbose shows all)')}"] if hidden else lines

    def _adapter_lines(self, label: str, shown: Sequence[Sequence[Diagnosis]]) -> list[str]:
        adapter = self.adapters[label]
        causes = [cause for cause in self.causes if cause[0].adapter == label]
        # Where only the most serious causes are told, an adapter that has none of them needs no heading.
        if causes and not any(cause in shown for cause in causes):
            return []
        read = count(len(adapter), "module") if adapter is not None else "not read"
        against = f", against {self.base}" if self.base else ""
        # Causes are counted and not findings: a fault in all of 200 modules is one thing to fix.
        lines = [f"{label} ({read}{against}): {_levels(causes)}"]
        for cause in causes:
            if cause in shown:
                lines += _cause_lines(cause, len(adapter or ()), self.modules_told)
        return [*lines, ""]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (rows_key("findings", FINDING_COLUMNS),)


def _levels(causes: Sequence[Sequence[Diagnosis]]) -> str:
    """``1 error, 2 warnings``, the most serious level first."""
    counts = Counter(cause[0].level for cause in causes)
    return ", ".join(count(counts[level], level) for level in LEVELS if counts[level]) or "nothing found"


def _cause_lines(diagnoses: Sequence[Diagnosis], of: int, most: int | None) -> list[str]:
    """The text of findings that have one cause, in an adapter of ``of`` modules; at most ``most`` modules are named."""
    first = diagnoses[0]
    head = f"  {first.level}: {first.code}: "
    texts = [(f"{finding.module}: " if finding.module else "") + finding.evidence for finding in diagnoses]
    if len(texts) == 1:  # on one line, as most findings are
        lines = [head + texts[0]]
    else:
        modules = {finding.module for finding in diagnoses if finding.module}
        # A fault of one kind in all blocks is the common case, and names its cause.
        kinds = {kind(name) for name in modules}
        alike = f", of the kind {kinds.pop()}" if len(kinds) == 1 else ""
        lines = [head + (f"{len(modules)} of {of} modules{alike}" if modules else f"{len(diagnoses)} of this kind")]
        # The checks list the worst modules of a cause first.
        lines += [f"    {text}" for text in texts[:most]]
        if most is not None and len(texts) > most:
            lines.append(f"    and {len(texts) - most} more{in_shell(' (--verbose names them)')}")
    return [*lines, f"    fix: {first.fix}"] if first.fix else lines


# No table for people: evidence and remedies are sentences, which a column would cut. --csv and --json use the columns.
FINDING_COLUMNS: Columns[Diagnosis] = (
    label_column("level", "level"),
    label_column("code", "code"),
    *(
        Column(key, key, key, align="left", priority=priority)
        for key, priority in (("adapter", 3), ("module", 8), ("evidence", 7), ("fix", 2))
    ),
)


DTYPES = FLOAT_TYPES | {"fp8": "float8_e4m3fn"}  # option → the name in NumPy and ml_dtypes


# A path may name a folder with several adapters, which no type can tell: hence Any.
@takes_options
def doctor(
    *adapters: Source,
    output: str | PathLike[str] | None = None,
    base: ModelPath | None = None,
    dtype: MergeDType | None = None,
    rounding: PredictedRounding = "nearest",
    consumer: Consumer | None = None,
    sarif: str | PathLike[str] | None = None,
    fail_on: Level = "error",
    overwrite: bool = False,
    jobs: int | None = None,
    selection: ModuleChoice,
    reading: Reading,
) -> DoctorResult | BatchResult:
    """Examine adapters for faults: list the findings, most serious first, each with its evidence and its remedy.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache. Several adapters are also compared with
    each other. A file that cannot be read is a finding too. The exit code is 1 if there is an error. How a merge with
    error feedback would round is known only from merging, so ``rounding`` does not offer it.

    The adapters in a folder that is not an adapter itself, or any adapters with ``output``, are examined one by one,
    with one line for each; the exit code is then 2 if one of them cannot be read. With ``output``, an adapter whose
    file exists is skipped, and its findings are those in the file, unless ``overwrite`` is given.

    Parameters
    ----------
    *adapters : path, Adapter or model
        Files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load` returns. An adapter
        with wrong numbers is examined too; `loralens.load` returns it with ``strict=False``.
    output : path, optional
        Examine the adapters one by one, and write the findings of each into this folder, as JSON.

        A folder for one JSON file with the findings of each adapter. An adapter whose file exists is skipped, and its
        row has the findings in the file.
    base : path or model, optional
        The base model: a folder, a safetensors or GGUF file, or a Hub id in the local cache. Also check the adapters
        against its weights.
    dtype : str, optional
        The dtype of the merged model whose rounding is predicted. [default: the dtypes of the base]
    rounding : str
        How a merge rounds the new weights to their dtype.
    consumer : str, optional
        Also find what this program rejects or ignores; ``list`` lists the programs.
    sarif : path, optional
        Also write the findings to FILE as SARIF 2.1.0, for CI systems.
    fail_on : str
        Exit with code 1 if there is a finding of this level or a more serious one.
    overwrite : bool
        Replace what is already at the output path.
    jobs : int, optional
        The number of adapters that are processed at a time, each in its own process. [default: 1]
    selection : ModuleChoice
        The options ``modules``, ``block``.
    reading : Reading
        The options ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        An unknown value of an option, a path that does not exist, a glob that matches nothing, a place where no log can
        be written.
    FormatError
        A base that is not a model.

    Notes
    -----
    An adapter that cannot be read then has the status ``failed``.

    Examples
    --------
    $ loralens doctor adapter
    $ loralens doctor folder --fail-on warning
    """
    modules = selection.globs
    check_choice("dtype", dtype, get_args(MergeDType))
    check_choice("rounding", str(rounding), get_args(PredictedRounding))
    check_choice("consumer", consumer, get_args(Consumer))
    check_choice("fail_on", fail_on, LEVELS)
    if sarif:  # checked first, as the examination of a large base takes long
        check_log_target(Path(sarif))
    chosen = sources(adapters)
    options: dict[str, Any] = {
        "base": base,
        "modules": modules,
        "dtype": dtype,
        "rounding": rounding,
        "consumer": consumer,
        **reading.stated,
    }
    if output is not None or any(map(is_several, chosen)):
        run = {"output": output, "fail_on": fail_on, "overwrite": overwrite, "jobs": jobs}
        batch = run_batch("doctor", chosen, lambda task: PurePosixPath(f"{task.name}.json"), options | run)
        if sarif:
            _write_sarif(_findings_of(batch), Path(sarif))
        return batch
    result = _examine(chosen, fail_on=fail_on, **options)
    if sarif:
        _write_sarif(result.findings, Path(sarif))
    return result


@takes_options
def _examine(
    chosen: Sequence[AdapterSource],
    *,
    base: ModelPath | None,
    modules: Sequence[str],
    dtype: MergeDType | None,
    rounding: PredictedRounding,
    consumer: Consumer | None = None,
    fail_on: Level | None = None,
    reading: Reading,
) -> DoctorResult:
    """Examine adapters and compare them with each other."""
    origins = dict(zip(labels(chosen), chosen, strict=True))
    loaded: dict[str, Adapter | None] = {}
    unreadable: list[Diagnosis] = []
    for label, source in zip(labels(chosen), chosen, strict=True):
        if label in loaded:  # a path that was given twice is examined once
            continue
        loaded[label] = None
        try:
            loaded[label] = load_source(source, reading, base=base, strict=False)
        except OptionError:  # a wrong path or option is a mistake of the caller and not a fault of an adapter
            raise
        except LoraLensError as error:  # one more finding, and the others are still examined
            unreadable.append(Diagnosis("error", UNREADABLE, error.what, error.fix, adapter=label))
    readable = {label: adapter for label, adapter in loaded.items() if adapter is not None}
    examinations = examine_adapters(
        readable,
        base=open_base(base) if base else None,
        modules=modules,
        reading=reading,
        dtype=DTYPES[dtype] if dtype else None,
        stochastic=rounding == "stochastic",
        saving=file_saving(origins, base),
    )
    findings = run_checks(examinations)
    if consumer is not None:
        # Everything about this program follows; a summary of what the common ones do would repeat it.
        findings = [finding for finding in findings if finding.code != CLIENT]
        # Some programs look names up as they are, so they are compared with those of the base.
        stored = with_tied_head(shapes(base), base) if base is not None else None
        for label, adapter in readable.items():
            matched = None
            with suppress(MismatchError):  # names that match nothing are a finding of the doctor itself
                if stored is not None:
                    matched = match({name: module.shape for name, module in adapter.items()}, stored)
            refused = consult(consumer, origins[label], adapter, match=matched, stored=stored, base=base)
            # What a check of the doctor says with the same words is said once.
            said = {finding.evidence for finding in findings if finding.adapter == label}
            refused = [finding for finding in refused if finding.text not in said]
            findings += [Diagnosis(f.level, f.code, f"{consumer}: {f.text}", f.fix, adapter=label) for f in refused]
    # Unreadable files are errors. Sorting is stable, so what a consumer does comes last within a level.
    findings = sorted(unreadable + findings, key=lambda finding: LEVELS.index(finding.level))
    return DoctorResult(findings, loaded, str(base) if base else None, fail_on)


def _examine_one(source: AdapterSource, *, output: Path | None, overwrite: bool, **options: Any) -> DoctorResult:
    """Examine one adapter of several, and write the findings as JSON.

    Raises
    ------
    FormatError
        The adapter cannot be read.
    """
    del overwrite  # what exists and is not to be replaced was skipped
    if output is not None:
        check_room(output)
    result = _examine([source], **options)
    if None in result.adapters.values():
        raise FormatError(result.findings[0].evidence, fix=result.findings[0].fix)
    if output is not None:
        with atomic_file(output) as stream:
            stream.write(dumps({"loralens": __version__, **result.record()}).encode("utf-8"))
    return result


def _read_findings(file: Path, options: Mapping[str, Any]) -> DoctorResult:
    """The findings about one adapter that an earlier run has written.

    Raises
    ------
    FormatError
        The file holds something else.
    """
    findings = read_json(file).get("findings")
    if not isinstance(findings, list) or not all(map(_is_finding, findings)):
        fix = "choose another output folder, or give --overwrite"
        raise FormatError(f"{file}: exists, and does not hold the findings of loralens doctor", fix=fix)
    adapters = dict.fromkeys(finding["adapter"] for finding in findings)
    return DoctorResult([Diagnosis(**each) for each in findings], adapters, fail_on=options.get("fail_on"))


def _is_finding(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != {column.key for column in FINDING_COLUMNS}:
        return False
    texts = [text for key, text in value.items() if key != "module" or text is not None]
    return value["level"] in LEVELS and all(map(is_safe_text, texts))


def _findings_of(batch: BatchResult) -> list[Diagnosis]:
    """The findings about all adapters; that one could not be examined is a finding about it."""
    findings = []
    for row in batch.rows:
        if row.status == "failed":
            findings.append(Diagnosis("error", UNREADABLE, row.reason, row.fix, adapter=row.source))
        # An adapter in memory and one of an earlier run have other labels there.
        findings += [Diagnosis(**{**finding, "adapter": row.source}) for finding in row.findings]
    return findings


WORK["doctor"] = AdapterWork(
    _examine_one,
    lambda result: {
        "numbers": result.numbers(),
        "answer": result.answer,
        "findings": result.record()["findings"],
    },
    recall=_read_findings,
)


def _write_sarif(diagnoses: Sequence[Diagnosis], file: Path) -> None:
    def locate(label: str) -> str:
        # SARIF names files, and a user may have given the folder of one, or a Hub id; what has no file keeps its label.
        try:
            return str(find_adapter(label).file)
        except LoraLensError:
            return label

    records = [{**finding.record(), "adapter": locate(finding.adapter)} for finding in diagnoses]
    write_sarif(sarif_log(records, rules=diagnosis_codes(), root=Path.cwd()), file)
