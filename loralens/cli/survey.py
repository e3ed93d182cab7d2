"""``loralens survey``: one line for each adapter under a folder."""

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import note_of_bases
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.survey import Duplicate, Summary
    from loralens.cli.table import Table
    from loralens.formats.records.collection import Found

    Adapters = Sequence[tuple[Found, Summary]]
    Copies = Mapping[Path, tuple[Path, Duplicate]]

WIDE = 28  # letters of a base model's name
COLUMNS = (  # of --csv
    "path",
    "format",
    "base_model",
    "modules",
    "zero_modules",
    "ranks",
    "scales",
    "parameters",
    "bytes",
    "frobenius",
    "effective_rank",
    "fingerprint",
    "duplicate_of",
    "duplicate_kind",
    "duplicate_difference",
    "findings",
    "reason",
)


@click.command("survey")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, everything.")
@click.option("--csv", "as_csv", is_flag=True, help="One line a file.")
@options.ALLOW_PICKLE
@options.ONCE
def command(folder: Path, as_json: bool, as_csv: bool, allow_pickle: bool, once: bool) -> None:
    """One line for each adapter under DIR: format, base, ranks, norms, effective rank, fingerprint, duplicates.

    What should be an adapter and cannot be read gets a line with the reason; whole models are told by their headers
    and only counted. Exit 0 whatever is there.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    adapters, unreadable, others, copies = _survey(folder, allow_pickle=allow_pickle, once=once)
    note_of_bases([found.adapter for found, _ in adapters if found.adapter])
    if as_json:
        click.echo(json.dumps(_record(folder, adapters, unreadable, others, copies)))
    elif as_csv:
        _write_csv(adapters, unreadable, copies)
    else:
        _show(folder, adapters, unreadable, others, copies)


def _survey(folder: Path, *, allow_pickle: bool, once: bool) -> "tuple[Adapters, list[Found], list[Found], Copies]":
    """Adapters, what is unreadable, what is no adapter, and who is a copy of whom."""
    from concurrent.futures import ThreadPoolExecutor

    from loralens.analysis.survey import duplicates, summary
    from loralens.cli.progress import progress
    from loralens.errors import LoraLensError
    from loralens.formats.records.collection import Found, candidates, examine

    def measure(path: Path) -> "tuple[Found, Summary | None]":
        found = examine(path, allow_pickle=allow_pickle, once=once)
        if found.adapter is None:
            return found, None
        try:
            return found, summary(found.adapter)
        except LoraLensError as error:
            return Found(path, None, found.size, "unreadable", ": ".join((*error.where, error.what)), error.fix), None

    paths = candidates(folder)
    measured = []
    with progress("reading", len(paths)) as step, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            for one in pool.map(measure, paths):
                measured.append(one)
                if step:
                    step(1)
        finally:  # after Ctrl-C what has not begun never begins
            pool.shutdown(cancel_futures=True)
    adapters = [(found, one) for found, one in measured if one]
    without = [found for found, one in measured if not one]
    twice = duplicates([found.adapter for found, _ in adapters if found.adapter], [one for _, one in adapters])
    copies = {adapters[one.index][0].path: (adapters[one.original][0].path, one) for one in twice}
    unreadable = [found for found in without if found.status == "unreadable"]
    return adapters, unreadable, [found for found in without if found.status == "other"], copies


def _record(
    folder: Path, adapters: "Adapters", unreadable: "Sequence[Found]", others: "Sequence[Found]", copies: "Copies"
) -> dict[str, Any]:
    return {
        "loralens": __version__,
        "folder": str(folder),
        "adapters": [_adapter_record(found, one, copies) for found, one in adapters],
        "unreadable": [{"path": str(one.path), "reason": one.reason, "fix": one.fix} for one in unreadable],
        "no_adapters": [{"path": str(one.path), "bytes": one.size, "reason": one.reason} for one in others],
    }


def _adapter_record(found: "Found", one: "Summary", copies: "Copies") -> dict[str, Any]:
    adapter = found.adapter
    assert adapter
    original, copy = copies.get(found.path, (None, None))
    return {
        "path": str(found.path),
        "format": adapter.format,
        "base_model": adapter.base_model,
        "modules": one.modules,
        "zero_modules": one.zero,
        "ranks": list(one.ranks),
        "scales": list(one.scales),
        "parameters": one.parameters,
        "bytes": found.size,
        "frobenius": one.frobenius,
        "effective_rank": one.effective_rank,
        "fingerprint": one.fingerprint,
        "duplicate_of": str(original) if original else None,
        "duplicate_kind": copy.kind if copy else None,
        "duplicate_difference": copy.difference if copy else None,
        "findings": [finding.record() for finding in adapter.findings],
    }


def _write_csv(adapters: "Adapters", unreadable: "Sequence[Found]", copies: "Copies") -> None:
    import csv

    lists = ("ranks", "scales")
    rows: list[dict[str, Any]] = []
    for found, one in adapters:
        record = _adapter_record(found, one, copies)
        record["findings"] = " ".join(finding["code"] for finding in record["findings"])
        rows.append(record | {name: " ".join(map(str, record[name])) for name in lists})
    writer = csv.DictWriter(sys.stdout, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    writer.writerows({"path": str(one.path), "reason": one.reason} for one in unreadable)


def _show(
    folder: Path, adapters: "Adapters", unreadable: "Sequence[Found]", others: "Sequence[Found]", copies: "Copies"
) -> None:
    from loralens.cli.table import Column, Table, count, show, size

    short = _short(folder, [found.path for found, _ in adapters] + [one.path for one in unreadable])
    show(
        _adapters_table(folder, adapters, copies, short),
        Table(
            f"{len(unreadable)} cannot be read",
            [Column("path", "left"), Column("reason", "left")],
            [[short[one.path], one.reason] for one in unreadable],
        ),
    )
    pickles = sum("--allow-pickle" in one.fix for one in unreadable)
    if pickles:
        say(f"{pickles} of them {'is a pickle' if pickles == 1 else 'are pickles'}: give --allow-pickle", "")
    if others:
        names = ", ".join(str(one.path.relative_to(folder)) for one in others[:3]) + (" …" if len(others) > 3 else "")
        hold = "holds" if len(others) == 1 else "hold"
        total = size(sum(one.size for one in others))
        say(f"no adapters: {count(len(others), 'file')} of {total} {hold} tensors and no LoRA pairs: {names}")
    if not (adapters or unreadable or others):
        say(f"{folder}: no adapter in this folder, nor in any under it")


def _adapters_table(folder: Path, adapters: "Adapters", copies: "Copies", short: Mapping[Path, str]) -> "Table":
    from loralens.cli.table import Column, Table, count, number, size

    rows = [
        [
            short[found.path],
            found.adapter.format,
            _base(found.adapter.base_model),
            f"{one.modules}" + (f" ({one.zero} zero)" if one.zero else ""),
            _span([str(rank) for rank in one.ranks]),
            _span([number(scale) for scale in one.scales]),
            f"{one.parameters:,}",
            size(found.size),
            number(one.frobenius),
            f"{one.effective_rank:.2f}",
            one.fingerprint[:12],
            _note(found, copies, short),
        ]
        for found, one in adapters
        if found.adapter
    ]
    left = [Column("path", "left"), Column("format", "left"), Column("base", "left")]
    heads = ("modules", "r", "scale", "parameters", "size", "‖ΔW‖F", "effective")
    columns = [*left, *map(Column, heads), Column("fingerprint", "left"), Column("", "left")]
    distinct = len(rows) - len(copies)
    return Table(f"{folder}: {count(len(rows), 'adapter')}, {distinct} of them different", columns, rows)


def _note(found: "Found", copies: "Copies", short: Mapping[Path, str]) -> str:
    """Whose copy this is, else what its reader found wrong."""
    if found.path in copies:
        original, copy = copies[found.path]
        if copy.kind == "tensors":
            return f"= {short[original]}"
        return f"≈ {short[original]} (ΔW differs by {copy.difference:.1g})"
    wrong = [finding.code for finding in found.adapter.findings if finding.level == "error"] if found.adapter else []
    return f"wrong: {', '.join(wrong)}" if wrong else ""


def _short(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """What a file is called in the table: its folder where it is alone in it, both relative to ``folder``."""
    alone = {parent for parent, files in Counter(path.parent for path in paths).items() if files == 1}
    return {
        path: str((path.parent if path.parent in alone and path.parent != folder else path).relative_to(folder))
        for path in paths
    }


def _base(name: str | None) -> str:
    """The last part of a base model's name or path, Windows' ones included."""
    last = (name or "–").replace("\\", "/").rstrip("/").rpartition("/")[2]
    return last if len(last) <= WIDE else f"{last[: WIDE - 1]}…"


def _span(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]}–{values[-1]}" if values else "–"
