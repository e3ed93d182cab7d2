"""``loralens inspect``: what is in an adapter file, and how it was understood."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options
from loralens.cli.bases import FIX, against
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.inspection import Inspection
    from loralens.cli.table import Table
    from loralens.core.naming.matching import Match

CONSUMERS = ("vllm", "lorax", "llama.cpp", "comfyui", "sd-scripts", "peft")


@click.command("inspect")
@click.argument("paths", nargs=-1, required=True, metavar="ADAPTER...")
@options.MODULES
@click.option("--base", metavar="DIR", help="The base model: say how the names match its weights (headers only).")
@click.option("--for", "consumer", type=click.Choice(CONSUMERS), help="Say what this consumer would reject or ignore.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, every module and tensor.")
@options.reading
def command(
    paths: tuple[str, ...],
    modules: tuple[str, ...],
    base: str | None,
    consumer: str | None,
    as_json: bool,
    **reading: Any,
) -> None:
    """Say what is in an adapter file: format, base, modules, scales and where they came from, leftovers, warnings.

    ADAPTER is a file, a folder that holds one, or a Hub id in the local cache.
    """
    inspected = [(path, _inspect(path, modules, base, consumer, reading)) for path in paths]
    if as_json:
        click.echo(json.dumps({"loralens": __version__, "adapters": [_record(*one) for one in inspected]}))
        return
    for path, inspection in inspected:
        _show(path, inspection)


def _inspect(
    path: str, modules: tuple[str, ...], base: str | None, consumer: str | None, reading: Mapping[str, Any]
) -> "Inspection":
    from loralens.analysis.inspection import inspect
    from loralens.core.adapter import Finding
    from loralens.errors import place
    from loralens.formats import load

    adapter = load(path, strict=False, base=base, **reading)
    with place(path):
        inspection = inspect(adapter, modules=modules)
        match = _match(inspection, base) if base else None
        told = against(adapter, base) if base else ""
        if told:
            inspection.findings.append(Finding("warning", "base-differs", told, FIX))
        if consumer:
            from loralens.analysis.clients.rules import check

            inspection.findings.extend(check(adapter, consumer, match))
        return inspection


def _match(inspection: "Inspection", base: str) -> "Match | None":
    """How the names match the base; where they do not, that is a finding and not the end."""
    from loralens.core.adapter import Finding
    from loralens.core.naming.matching import match
    from loralens.errors import MismatchError
    from loralens.formats.models.checkpoint import shapes

    known = options.shown(shapes(Path(base)), base)
    try:
        found = match({name: module.shape for name, module in inspection.modules.items()}, known)
    except MismatchError as error:
        inspection.findings.append(Finding("error", "names", f"against {base}: {error.what}", error.fix))
        return None
    inspection.findings.append(Finding("note", "names", f"against {base}: {found}"))
    return found


def _record(path: str, inspection: "Inspection") -> dict[str, Any]:
    adapter, zero = inspection.adapter, set(inspection.zero)
    return {
        "path": path,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "modules": [
            {
                "name": name,
                "kind": module.layout.kind,
                "shape": list(module.shape),
                "rank": module.rank,
                "scale": module.scale,
                "scale_source": str(module.scaling),
                "dtype": str(module.dtype),
                "parameters": module.parameters,
                "bytes": module.nbytes,
                "zero": name in zero,
            }
            for name, module in inspection.modules.items()
        ],
        "extra": [
            {
                "key": key,
                "role": extra.role,
                "module": extra.module,
                "shape": list(extra.tensor.shape),
                "dtype": str(extra.tensor.dtype),
                "bytes": extra.tensor.nbytes,
            }
            for key, extra in inspection.extra.items()
        ],
        "metadata": None if adapter.metadata is None else dict(adapter.metadata),
        "findings": [f.record() for f in inspection.findings],
        "total": {
            "modules": len(inspection.modules),
            "parameters": inspection.parameters,
            "bytes": inspection.nbytes,
            "extra_bytes": sum(extra.tensor.nbytes for extra in inspection.extra.values()),
        },
    }


def _show(path: str, inspection: "Inspection") -> None:
    from loralens.cli.table import Column, Table, show

    facts = Table(path, (Column("", "left"), Column("", "left")), _facts(inspection))
    show(facts, _kinds_table(inspection), _extra_table(inspection))
    for finding in inspection.findings:
        say(f"{finding.level}: {finding.text}")
        if finding.fix:
            say(f"  fix: {finding.fix}")


def _facts(inspection: "Inspection") -> list[tuple[str, str]]:
    from loralens.cli.table import size

    adapter, modules = inspection.adapter, inspection.modules
    ranks = Counter(module.rank for module in modules.values())
    scales = Counter((module.scale, str(module.scaling)) for module in modules.values())
    extra_bytes = sum(extra.tensor.nbytes for extra in inspection.extra.values())
    facts = [
        ("format", adapter.format),
        ("base model", adapter.base_model or "not said"),
        ("modules", str(len(modules))),
        ("rank", _counted({str(rank): count for rank, count in sorted(ranks.items())})),
        ("scale", _counted({f"{scale:.6g}, {source}": count for (scale, source), count in scales.most_common(5)})),
        ("size", f"{inspection.parameters:,} parameters in pairs, {size(inspection.nbytes)}"),
    ]
    if inspection.extra:
        facts.append(("besides", f"{len(inspection.extra)} other tensors, {size(extra_bytes)}"))
    return facts


def _counted(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{text} ({count} modules)" for text, count in counts.items())


def _kinds_table(inspection: "Inspection") -> "Table":
    from loralens.cli.table import Column, Table
    from loralens.core.names import kind, natural_key

    kinds: dict[tuple[str, ...], list[str]] = {}
    for name, module in inspection.modules.items():
        out, in_ = module.shape
        weight = module.layout.kind + (" transposed" if module.layout.transposed else "")
        key = (kind(name), weight, f"{out} × {in_}", str(module.rank), f"{module.scale:.4g}", str(module.dtype))
        kinds.setdefault(key, []).append(name)
    rows = [
        [key[0], str(len(names)), _blocks(names), *key[1:], f"{sum(inspection.modules[n].parameters for n in names):,}"]
        for key, names in sorted(kinds.items(), key=lambda item: natural_key(item[0][0]))
    ]
    left = [Column(title, "left") for title in ("blocks", "weight")]
    right = [Column(title) for title in ("out × in", "r", "scale", "dtype", "parameters")]
    return Table("modules", [Column("kind", "left"), Column("modules"), *left, *right], rows)


def _blocks(names: list[str]) -> str:
    """Block numbers as ranges, stack by stack: ``0–11``; ``down_blocks 0–2, up_blocks 1–3``."""
    from loralens.core.names import block

    stacks: dict[str, set[int]] = {}
    for found in map(block, names):
        if found:
            stacks.setdefault(found.stack, set()).add(found.number)
    if len(stacks) == 1:
        return _ranges(sorted(next(iter(stacks.values()))))
    return ", ".join(f"{stack} {_ranges(sorted(numbers))}" for stack, numbers in stacks.items())


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return " ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)


def _extra_table(inspection: "Inspection") -> "Table":
    from loralens.cli.table import Column, Table, size

    rows = [
        [key, extra.role, " × ".join(map(str, extra.tensor.shape)), str(extra.tensor.dtype), size(extra.tensor.nbytes)]
        for key, extra in inspection.extra.items()
    ]
    columns = [Column("key", "left"), Column("role", "left"), *map(Column, ("shape", "dtype", "size"))]
    return Table("not half of any pair, kept as they are", columns, rows)
