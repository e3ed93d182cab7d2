"""The verb ``doctor``: examines adapters for faults, and says what mends them."""

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack, get_args, overload

from loralens.analysis.checks.clients import CODE as CLIENT
from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis
from loralens.analysis.clients.rules import check
from loralens.analysis.doctor import UNREADABLE, diagnosis_codes, run_checks
from loralens.choices import FLOAT_TYPES, Consumer, Level, MergeDType, PredictedRounding
from loralens.core.adapter import Adapter, Finding
from loralens.core.naming.matching import match
from loralens.errors import FormatError, LoraLensError, MismatchError, OptionError
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import read_json
from loralens.formats.files.disk import check_room
from loralens.formats.files.json_text import dumps, is_safe_text
from loralens.formats.files.location import adapter_file
from loralens.formats.models.checkpoint import shapes
from loralens.formats.records.sarif import check_log_target, write_sarif
from loralens.formats.records.sarif import sarif as sarif_log
from loralens.verbs.batches.batch import WORK, AdapterWork, is_several, run_batch
from loralens.verbs.batches.batch_result import BatchResult
from loralens.verbs.inputs.adapters import AdapterSource, Reading, Source, labels, load_source, sources
from loralens.verbs.inputs.bases import ModelPath, with_tied_head
from loralens.verbs.inputs.choices import Blocks, as_globs, check_choice
from loralens.verbs.inputs.examination import examine_adapters, open_base
from loralens.verbs.outputs.doctor_result import FINDING_COLUMNS, DoctorResult
from loralens.verbs.outputs.form import file_saving
from loralens.version import __version__

DTYPES = FLOAT_TYPES | {"fp8": "float8_e4m3fn"}  # option → the name in NumPy and ml_dtypes


class DoctorOptions(Reading, total=False):
    """The options of `doctor`, for its two signatures."""

    base: str | PathLike[str] | None
    modules: Sequence[str]
    block: Blocks
    dtype: MergeDType | None
    rounding: PredictedRounding
    consumer: Consumer | None
    sarif: str | PathLike[str] | None
    fail_on: Level | None
    overwrite: bool
    jobs: int | None


# A path may name a folder with several adapters, which no type can tell: hence Any.
@overload
def doctor(*adapters: Source, output: None = None, **options: Unpack[DoctorOptions]) -> DoctorResult | Any: ...
@overload
def doctor(*adapters: Source, output: str | PathLike[str], **options: Unpack[DoctorOptions]) -> BatchResult: ...
def doctor(
    *adapters: Source,
    output: str | PathLike[str] | None = None,
    base: str | PathLike[str] | None = None,
    modules: Sequence[str] = (),
    block: Blocks = (),
    dtype: MergeDType | None = None,
    rounding: PredictedRounding = "nearest",
    consumer: Consumer | None = None,
    sarif: str | PathLike[str] | None = None,
    fail_on: Level | None = None,
    overwrite: bool = False,
    jobs: int | None = None,
    **reading: Unpack[Reading],
) -> DoctorResult | BatchResult:
    """Examine adapters for faults: list the findings, most serious first, each with its evidence and its remedy.

    Several adapters that are named are also compared with each other. A file that cannot be read is a finding too.

    The adapters in a folder that is not an adapter itself, or any adapters with ``output``, are examined one by one,
    and the result is a `BatchResult` with one row for each. An adapter that cannot be read then has the status
    ``failed``.

    Parameters
    ----------
    *adapters : path or Adapter
        Files, folders that hold an adapter, Hub ids in the local cache, or what `loralens.load` returns. An adapter
        with wrong numbers is examined too; `loralens.load` returns it with ``strict=False``.
    output : path, optional
        A folder for one JSON file with the findings of each adapter. An adapter whose file exists is skipped, and its
        row has the findings in the file.
    base : path, optional
        The base model: its names and sizes are compared, and the effect of rounding in a merge is predicted.
    modules : sequence of str
        Only modules whose name or kind matches one of these glob patterns.
    block : int, str or sequence of them
        Only modules in these blocks: ``3``, ``"4-8"``, or ``"IN04"`` of an image model.
    dtype : str, optional
        The dtype of the merged model whose rounding is predicted: ``bf16``, ``f16``, ``f32`` or ``fp8``; as the base by
        default.
    rounding : str
        How a merge rounds the new weights: ``nearest`` or ``stochastic``. Error feedback is known only from merging.
    consumer : str, optional
        A program that loads the adapter, such as ``vllm``: what it rejects or ignores is found too.
    sarif : path, optional
        A file to write the findings to, as SARIF 2.1.0.
    fail_on : str, optional
        ``error``, ``warning`` or ``note``: the result's ``answer`` is false where a finding is of this level or worse.
    overwrite : bool
        Examine adapters again whose files exist in ``output``.
    jobs : int, optional
        The number of adapters that are examined at a time, each in its own process, if they are examined one by one; 1
        by default.
    **reading : Reading
        How files are read: ``format``, ``alpha``, ``scale``, ``once``.

    Raises
    ------
    OptionError
        An unknown value of an option, a path that does not exist, a glob that matches nothing, a place where no log can
        be written.
    FormatError
        A base that is not a model.
    """
    modules = as_globs(modules, block)
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
        **reading,
    }
    if output is not None or any(map(is_several, chosen)):
        run = {"output": output, "fail_on": fail_on, "overwrite": overwrite, "jobs": jobs}
        batch = run_batch("doctor", chosen, lambda name, *_: name.with_name(f"{name.name}.json"), options | run)
        if sarif:
            _write_sarif(_findings_of(batch), Path(sarif))
        return batch
    result = _examine(chosen, fail_on=fail_on, **options)
    if sarif:
        _write_sarif(result.findings, Path(sarif))
    return result


def _examine(
    chosen: Sequence[AdapterSource],
    *,
    base: str | PathLike[str] | None,
    modules: Sequence[str],
    dtype: MergeDType | None,
    rounding: PredictedRounding,
    consumer: Consumer | None = None,
    fail_on: Level | None = None,
    **reading: Unpack[Reading],
) -> DoctorResult:
    """Examine adapters and compare them with each other."""
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
    examinations = examine_adapters(
        {label: adapter for label, adapter in loaded.items() if adapter is not None},
        base=open_base(base) if base else None,
        modules=modules,
        reading=reading,
        dtype=DTYPES[dtype] if dtype else None,
        stochastic=rounding == "stochastic",
        saving=file_saving(dict(zip(labels(chosen), chosen, strict=True)), base),
    )
    findings = run_checks(examinations)
    if consumer is not None:
        # Everything about this program follows; a summary of what the common ones do would repeat it.
        findings = [finding for finding in findings if finding.code != CLIENT]
        for label, adapter in loaded.items():
            refused = _consumer_findings(adapter, consumer, base) if adapter is not None else ()
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
    DoctorResult.numbers,
    answer=lambda result: result.answer,
    findings=lambda result: result.record()["findings"],
    recall=_read_findings,
)


def _write_sarif(diagnoses: Sequence[Diagnosis], file: Path) -> None:
    def locate(label: str) -> str:
        # SARIF names files, and a user may have given the folder of one, or a Hub id; what has no file keeps its label.
        try:
            return str(adapter_file(Path(label)))
        except LoraLensError:
            return label

    records = [{**finding.record(), "adapter": locate(finding.adapter)} for finding in diagnoses]
    write_sarif(sarif_log(records, rules=diagnosis_codes(), root=Path.cwd()), file)


def _consumer_findings(adapter: Adapter, consumer: Consumer, base: ModelPath | None) -> list[Finding]:
    """The findings about ``consumer``, the program that loads the adapter.

    With a base, the names of the modules are compared with it too, because some programs look names up as they are.
    """
    matched = None
    if base is not None:
        # Names that match nothing are a finding of the doctor itself.
        try:
            matched = match(
                {name: module.shape for name, module in adapter.items()}, with_tied_head(shapes(Path(base)), base)
            )
        except MismatchError:
            matched = None
    return check(adapter, consumer, matched)
