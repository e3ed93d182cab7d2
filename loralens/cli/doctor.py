"""``loralens doctor``: what is wrong with an adapter, and what mends it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import given, named_by
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.checks.base import Base
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.core.adapter import Adapter

LEVELS = ("error", "warning", "note")
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "fp8": "float8_e4m3fn"}
ROUNDINGS = ("nearest", "stochastic")  # of those of a merge, what can be foretold
WORST = 3  # modules that a line of text names


@click.command("doctor")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--base", metavar="MODEL", help=options.BASE_HELP)
@options.MODULES
@click.option("--dtype", type=click.Choice(list(DTYPES)), help="The dtype of a merge. [default: as the base]")
@click.option(
    "--rounding",
    type=click.Choice(ROUNDINGS),
    default=ROUNDINGS[0],
    show_default=True,
    help="How a merge would round; of error feedback only merging tells.",
)
@click.option(
    "--sarif", type=click.Path(path_type=Path), metavar="FILE", help="Write the findings as SARIF 2.1.0, for CI."
)
@click.option(
    "--fail-on", type=click.Choice(LEVELS), help="Exit 1 when there is a finding of this level or a worse one."
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, one finding a module.")
@options.reading
def command(
    paths: tuple[str, ...],
    base: str | None,
    modules: tuple[str, ...],
    dtype: str | None,
    rounding: str,
    sarif: Path | None,
    fail_on: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Say what is wrong with adapters, most serious first, each finding with its evidence and what mends it.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache; several are also compared with each
    other. A file that cannot be read is a finding too. Exit 0 whatever is found, unless --fail-on says otherwise.
    """
    from loralens.analysis.doctor import diagnose
    from loralens.cli.progress import progress
    from loralens.formats import FORMATS
    from loralens.formats.records.sarif import check_place

    if sarif:
        check_place(sarif)
    adapters, broken = _load(dict.fromkeys(paths), base, reading)
    bed = base_of(base) if base else None
    only_read = {form.name for form in FORMATS if not form.writer}
    with progress("examining", sum(map(len, adapters.values()))) as step:
        findings = broken + diagnose(
            adapters,
            base=bed,
            dtype=DTYPES.get(dtype or ""),
            stochastic=rounding == "stochastic",
            modules=modules,
            only_read=only_read,
            reading=options.as_typed(reading),
            named=named_by(adapters),
            step=step,
        )
    if sarif:
        _write_sarif(sarif, findings)
    if as_json:
        click.echo(json.dumps({"loralens": __version__, "findings": [one.record() for one in findings]}))
    else:
        for path in dict.fromkeys(paths):
            _show(path, [one for one in findings if one.adapter == path], adapters.get(path), base)
    if fail_on and any(LEVELS.index(one.level) <= LEVELS.index(fail_on) for one in findings):
        click.get_current_context().exit(1)


def _load(
    paths: Mapping[str, None], base: str | None, reading: Mapping[str, Any]
) -> "tuple[dict[str, Adapter], list[Diagnosis]]":
    """The adapters that can be read, and a finding for each that cannot; a wrong path or option is no finding."""
    from loralens.analysis.checks.diagnosis import Diagnosis
    from loralens.analysis.doctor import UNREADABLE
    from loralens.errors import LoraLensError, OptionError
    from loralens.formats import load

    adapters, broken = {}, []
    for path in paths:
        try:
            adapters[path] = load(path, strict=False, base=base, **reading)
        except OptionError:
            raise
        except LoraLensError as error:
            broken.append(Diagnosis("error", UNREADABLE, error.what, error.fix, adapter=path))
    return adapters, broken


def base_of(base: str) -> "Base":
    """The model that adapters are held against, opened, with the head that shares its embedding's weight."""
    from loralens.analysis.checks.base import Base
    from loralens.formats.models.checkpoint import stores_conv1d

    checkpoint = options.opened(base)
    return Base(
        base, options.shown(checkpoint.tensors, base), stores_conv1d(Path(base)), checkpoint.float8, given(base)
    )


def _write_sarif(file: Path, findings: "Sequence[Diagnosis]") -> None:
    from loralens.analysis.doctor import rules
    from loralens.errors import LoraLensError
    from loralens.formats.files.location import adapter_file
    from loralens.formats.records.sarif import sarif, write_sarif

    def located(path: str) -> str:
        try:
            return str(adapter_file(Path(path)))
        except LoraLensError:
            return path

    records = [{**one.record(), "adapter": located(one.adapter)} for one in findings]
    write_sarif(sarif(records, rules=rules(), root=Path.cwd()), file)
    say(f"wrote {file}", err=True)


def _show(path: str, findings: "Sequence[Diagnosis]", adapter: "Adapter | None", base: str | None) -> None:
    """The findings of one adapter, those of one kind together."""
    from loralens.analysis.checks.diagnosis import by_cause
    from loralens.cli.table import count

    read = count(len(adapter), "module") if adapter is not None else "not read"
    against = f", against {base}" if base else ""
    causes = by_cause(findings)
    levels: Counter[str] = Counter(same[0].level for same in causes)
    said = ", ".join(count(levels[level], level) for level in LEVELS if levels[level])
    say(f"{path} ({read}{against}): {said or 'nothing found'}")
    for same in causes:
        _show_kind(same, len(adapter) if adapter is not None else 0)
    click.echo()


def _show_kind(same: "Sequence[Diagnosis]", of: int) -> None:
    from loralens.core.names import kind

    first = same[0]
    if len(same) == 1:
        where = f"{first.module}: " if first.module else ""
        say(f"  {first.level}: {first.code}: {where}{first.evidence}")
    else:
        modules = {one.module for one in same if one.module}
        kinds = {kind(name) for name in modules}
        alike = f", of the kind {kinds.pop()}" if len(kinds) == 1 else ""
        where = f"{len(modules)} of {of} modules{alike}" if modules else f"{len(same)} of this kind"
        say(f"  {first.level}: {first.code}: {where}")
        shown = same[:WORST]
        for one in shown:
            say(f"    {one.module}: {one.evidence}" if one.module else f"    {one.evidence}")
        if len(same) > len(shown):
            say(f"    and {len(same) - len(shown)} more (--json names them)")
    if first.fix:
        say(f"    fix: {first.fix}")
