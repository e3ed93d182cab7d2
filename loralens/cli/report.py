"""``loralens report``: adapters as one page worth sending to a colleague."""

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import named_by
from loralens.cli.terminal import say
from loralens.core.shell import typed

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.base.intruders import Intruders
    from loralens.analysis.checks.base import Base
    from loralens.analysis.checks.patient import Patient
    from loralens.core.adapter import Adapter
    from loralens.core.moments import Moments
    from loralens.core.weights import Weight
    from loralens.reporting.allotment import Dialect
    from loralens.reporting.company import Course
    from loralens.reporting.document import Report
    from loralens.reporting.subject import Beside, Subject

PATIENCE = 60.0  # seconds that SVDs of the base may take without being asked for
THREADS = os.cpu_count() or 1


@click.command("report")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="FILE", help="The page to write: reports/x.html."
)
@click.option("--base", metavar="MODEL", help="Also hold each adapter against it. " + options.BASE_HELP)
@click.option(
    "--activations",
    metavar="FILE",
    multiple=True,
    help="What real inputs excite, as `loralens calibrate` measured it, each file for its adapter. Repeatable.",
)
@options.MODULES
@click.option(
    "--intruders/--no-intruders",
    default=None,
    help="Look for intruder dimensions, which takes an SVD of every weight. [default: where a minute will do]",
)
@click.option("--markdown", "with_markdown", is_flag=True, help="Also write it as Markdown, with pictures, beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the same numbers, machine-readable.")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@options.reading
def command(
    paths: tuple[str, ...],
    output: Path | None,
    base: str | None,
    activations: tuple[str, ...],
    modules: tuple[str, ...],
    intruders: bool | None,
    with_markdown: bool,
    as_json: bool,
    overwrite: bool,
    **reading: Any,
) -> None:
    """Put what can be said about adapters on one self-contained page: findings, spectra, ranks, and how they compare.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache; a run's folder stands for its
    checkpoints. With --base also what ΔW amplifies, intruder dimensions, and what a merge would lose.
    """
    if output is None and not as_json:
        raise click.UsageError("Missing option '-o': say where to write the page, or give --json")
    if with_markdown and output is None:
        raise click.UsageError("--markdown is written beside the page of -o")
    if intruders and not base:
        raise click.UsageError("--intruders are looked for in W + ΔW: give --base")
    from loralens.reporting.writing import beside, check_target, numbers, write_report

    older: list[Path] = []
    if output:
        check_target(output, with_markdown=with_markdown, overwrite=overwrite)
        _check_apart(output, paths, base, activations, with_markdown=with_markdown)
        older = [] if with_markdown or not output.exists() else [path for path in beside(output) if path.exists()]
    spoken = _spoken(paths, output, base, activations, modules, reading, intruders=intruders, markdown=with_markdown)
    report = _report(_expanded(paths), base, activations, modules, reading, intruders=intruders, spoken=spoken)
    if output:
        for path in write_report(report, output, with_markdown=with_markdown):
            say(f"wrote {path}", err=True)
        if older:
            which = " and ".join(map(str, older))
            say(f"note: left as before, of an earlier report: {which}; --markdown writes them anew", err=True)
    if as_json:
        click.echo(numbers(report))


def _check_apart(
    output: Path, paths: Sequence[str], base: str | None, activations: Sequence[str], *, with_markdown: bool
) -> None:
    """Refuse a page, or a folder of pictures, that is what the report is of or holds some of it."""
    from loralens.formats.files.apart import check_apart
    from loralens.formats.files.location import existing
    from loralens.reporting.writing import beside

    places = [Path(path) for path in (*paths, *activations, *([base] if base else []))]
    inputs = [(str(path), existing(path)) for path in places]
    for target in (output, *(beside(output) if with_markdown else ())):
        check_apart(target, inputs, within=False)


def _spoken(
    paths: Sequence[str],
    output: Path | None,
    base: str | None,
    activations: Sequence[str],
    modules: Sequence[str],
    reading: Mapping[str, Any],
    *,
    intruders: bool | None,
    markdown: bool,
) -> str:
    """The command as it is typed, on one line."""
    words = ["loralens", "report", *paths]
    words += ["--base", base] if base else []
    words += [word for file in activations for word in ("--activations", file)]
    words += [word for glob in modules for word in ("--modules", glob)]
    words += [] if intruders is None else ["--intruders" if intruders else "--no-intruders"]
    last = ["-o", str(output)] if output else ["--json"]
    last += ["--markdown"] if markdown else []
    return " ".join(filter(None, [typed(*words), options.as_typed(reading), typed(*last)]))


def _expanded(paths: Sequence[str]) -> list[str]:
    """The paths, each once; each that is the folder of a run, as its checkpoints."""
    return list(dict.fromkeys(one for path in paths for one in _members(path)))


def _members(path: str) -> list[str]:
    """The checkpoints of a run's folder, else the path itself.

    Raises
    ------
    OptionError
        A folder of several adapters that is no run.
    """
    from loralens.errors import LoraLensError, OptionError
    from loralens.formats.records.runs import run_of

    folder = Path(path)
    if not folder.is_dir() or _holds_one(folder):
        return [path]
    try:
        return [str(one.path) for one in run_of([folder]).checkpoints]
    except LoraLensError:
        several = sorted(one for one in folder.iterdir() if _holds_one(one))
    if len(several) < 2:
        return [path]
    shown = typed(*map(str, several[:3])) + (" …" if len(several) > 3 else "")
    raise OptionError(
        f"{path}: is no run, and holds {len(several)} adapters", fix=f"give each: loralens report {shown}"
    )


def _holds_one(path: Path) -> bool:
    from loralens.errors import LoraLensError
    from loralens.formats.files.location import SUFFIXES, adapter_file

    try:
        return (path.is_dir() or path.suffix in SUFFIXES) and bool(adapter_file(path))
    except LoraLensError:
        return False


def _report(
    paths: Sequence[str],
    base: str | None,
    activations: Sequence[str],
    modules: Sequence[str],
    reading: Mapping[str, Any],
    *,
    intruders: bool | None,
    spoken: str,
) -> "Report":
    from loralens.analysis.doctor import examined, findings
    from loralens.cli.doctor import base_of
    from loralens.cli.progress import progress
    from loralens.cli.similarity_many import labels
    from loralens.formats import FORMATS
    from loralens.reporting.company import company
    from loralens.reporting.make import report
    from loralens.reporting.subject import subject

    adapters = _load(paths, base, reading)
    moments = _moments(activations, adapters)
    against = base_of(base) if base else None
    only_read = {form.name for form in FORMATS if not form.writer}
    modules_in_all = sum(map(len, adapters.values()))
    with progress("examining", modules_in_all) as step:
        typed = options.as_typed(reading)
        patients = examined(
            adapters,
            base=against,
            modules=modules,
            only_read=only_read,
            reading=typed,
            named=named_by(adapters),
            step=step,
        )
    found = findings(patients)
    beside = [_beside(one, against, intruders) if against else None for one in patients]
    subjects: list[Subject] = []
    widest = max(map(len, adapters.values()), default=0)
    with progress("measuring", modules_in_all + (2 * widest if len(adapters) > 1 else 0)) as step:
        for one, label, held in zip(patients, labels(paths), beside, strict=True):
            dialect = _dialect(one.adapter, base)
            file, its = moments.get(one.path, ("", None))
            subjects.append(
                subject(one, label, dialect, moments=its, activations=file, beside=held, threads=THREADS, step=step)
            )
            if file and not subjects[-1].on_data:
                say(f"warning: {one.path}: activations are not used beside NaN or Inf", err=True)
        together = company(subjects, threads=THREADS, step=step) if len(subjects) > 1 else None
        run = _course(subjects) if together else None
    given = {"activations": list(activations), "chosen": list(modules)}
    return report(subjects, found, company=together, course=run, base=base, command=spoken, given=given)


def _load(paths: Sequence[str], base: str | None, reading: Mapping[str, Any]) -> "dict[str, Adapter]":
    """The adapters; what is wrong with their numbers is a finding, not the end."""
    from loralens.formats import load

    return {path: load(path, strict=False, base=base, **reading) for path in paths}


def _moments(files: Sequence[str], adapters: "Mapping[str, Adapter]") -> "dict[str, tuple[str, Moments]]":
    """Path of an adapter → the file of activations that belongs to it, and what it holds; others are named on stderr.

    Raises
    ------
    MismatchError
        A file that belongs to none of the adapters.
    """
    from loralens.core.fingerprint import fingerprint
    from loralens.errors import MismatchError
    from loralens.formats.records.moments import load_moments

    if not files:
        return {}
    held = {file: load_moments(file) for file in files}
    prints = {path: fingerprint(adapter) for path, adapter in adapters.items()}
    for file, moments in held.items():
        if moments.fingerprint not in prints.values():
            raise MismatchError(
                f"{file}: these activations belong to another adapter: names, shapes or factors differ",
                fix="measure them with one of these: loralens calibrate",
            )
    found = {path: (f, m) for f, m in held.items() for path, mark in prints.items() if mark == m.fingerprint}
    for path in adapters:
        if path not in found:
            say(f"warning: {path}: no activations given are its own; its errors are those of ΔW", err=True)
    return found


def _dialect(adapter: "Adapter", base: str | None) -> "Dialect":
    """How a smaller adapter would be written: in its own dialect, or PEFT's where that is only read or in few bits."""
    from loralens.cli.compress_form import FEW, Form
    from loralens.cli.convert import TARGETS
    from loralens.formats import stored_as
    from loralens.reporting.allotment import Dialect

    own = adapter.format if adapter.format in TARGETS and adapter.format != FEW else "peft"
    form = Form(own, {}, base) if own != "gguf" else Form.of(adapter, to=own, base=base)
    return Dialect(own, lambda one: stored_as(one, own, **form.given), form.one_rank)


def _beside(patient: "Patient", base: "Base", intruders: bool | None) -> "Beside":
    """What the weights of the base make of the modules that have one there."""
    from loralens.analysis.base.amplification import measure_amplification
    from loralens.analysis.base.weight_norms import work
    from loralens.analysis.checks.base import find
    from loralens.cli.progress import progress
    from loralens.errors import place
    from loralens.linalg.device import Device
    from loralens.reporting.subject import Beside

    spectra = patient.spectra
    modules = {name: reading.module for name, reading in patient.readings.items() if name in spectra}
    weights, _ = find(modules, base)
    device = Device.of("cpu", threads=THREADS)
    with place(base.name), progress("reading the base", work(weights.values(), top=False)) as step:
        chosen = patient.adapter.without([name for name in patient.adapter if name not in weights])
        amplified = measure_amplification(chosen, weights, top=False, device=device, step=step) if weights else {}
    found, without = _intruders(patient, weights, base.name, intruders)
    return Beside(amplified=amplified, intruders=found, without=without)


def _intruders(
    patient: "Patient", weights: "Mapping[str, Weight]", base: str, asked: bool | None
) -> "tuple[dict[str, Intruders] | None, str]":
    """The intruders of all modules, or why they were not looked for."""
    from loralens.analysis.base.intruders import find_intruders
    from loralens.cli.intruders import decomposed, duration, seconds_a_product, svd_store, svd_work
    from loralens.core.carried import magnitudes
    from loralens.errors import place
    from loralens.linalg.device import Device

    if asked is False:
        return None, "--no-intruders was given"
    bent = magnitudes(patient.adapter)
    plain = {name: weight for name, weight in weights.items() if name not in bent}
    if not plain:
        return None, "its modules are DoRA, whose tuned weight is not W + ΔW" if weights else ""
    device = Device.of("cpu")
    if asked is None:
        seconds = sum(map(svd_work, plain.values())) * seconds_a_product(device)
        if seconds > PATIENCE:
            told = f"the SVD of {len(plain)} weights of the base would take about {duration(seconds)}"
            say(f"note: {patient.path}: no intruders: {told}; --intruders does it", err=True)
            return None, f"{told} (loralens report --intruders does it, and keeps them)"
    found = {}
    store = svd_store(None, "20GB", no_cache=False)
    with closing(decomposed(plain, store, base, device)) as each:  # its progress bar ends whatever happens
        for name, W in each:
            with place(patient.path), place(name):
                found[name] = find_intruders(patient.adapter[name], W).without_vectors()
    return found, ""


def _course(subjects: "Sequence[Subject]") -> "Course | None":
    """The run that the adapters are checkpoints of, where they are."""
    from loralens.errors import LoraLensError
    from loralens.formats.records.runs import run_of
    from loralens.reporting.company import course

    try:
        run = run_of([Path(one.path) for one in subjects])
    except LoraLensError:  # two of one step, or a state that cannot be read: no run that could be told
        return None
    steps = {one.path: one.step for one in run.checkpoints}
    losses = {
        name: [(loss.step, loss.value) for loss in logged]
        for name, logged in (("loss", run.train), ("eval loss", run.evaluation))
        if logged
    }
    return course(subjects, [steps.get(Path(one.path)) for one in subjects], losses, threads=THREADS)
