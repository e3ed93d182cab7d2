"""``loralens intruders``: singular vectors of W + ΔW that W does not have, their energy, and a way to shrink them."""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options, target
from loralens.cli.rounding import ALLOW_LOSS, Rounding
from loralens.cli.terminal import say
from loralens.version import __version__

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.analysis.base.intruders import Intruders
    from loralens.cli.table import Table
    from loralens.core.adapter import Adapter
    from loralens.core.structured import Update
    from loralens.core.weights import Weight
    from loralens.formats.records.cache import SvdCache
    from loralens.linalg.device import Device
    from loralens.linalg.rank_update import Decomposed

Found = Mapping[str, "Intruders"]

SAMPLE = 256  # side of the matrix whose SVD is timed, so that the others' time can be said
KEPT = 20  # an SVD of W takes so many times what the rest of a module does (measured at n = 2048)
PATH = click.Path(path_type=Path)


@click.command("intruders")
@click.argument("adapter", metavar="ADAPTER")
@click.option("--base", required=True, metavar="MODEL", help=options.BASE_HELP)
@options.MODULES
@click.option(
    "--top", type=click.IntRange(min=1), default=10, show_default=True, help="Look at so many leading directions."
)
@click.option(
    "--threshold",
    type=click.FloatRange(0, 1, min_open=True),
    callback=options.finite,
    default=0.5,
    show_default=True,
    help="An intruder has no cosine as large as this with any direction of W.",
)
@click.option(
    "--remove",
    type=float,
    callback=options.finite,
    metavar="λ",
    help="Write an adapter that leaves λ of every intruder: 0 removes them, 1 keeps them. Needs -o.",
)
@click.option("-o", "--output", type=PATH, metavar="TARGET", help="Where --remove writes: a folder or a file.")
@click.option("--uniform", is_flag=True, help="Give all modules of the written adapter one rank, with zeros.")
@click.option(
    "--dtype",
    type=click.Choice(list(options.DTYPES)),
    default="f32",
    show_default=True,
    help="Of the changed factors.",
)
@ALLOW_LOSS
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what --remove would write, and write nothing.")
@click.option("--cache", type=PATH, metavar="DIR", help="Where SVDs of W are kept. [default: the user's cache folder]")
@click.option("--cache-limit", default="20GB", show_default=True, metavar="SIZE", help="Drop the oldest beyond this.")
@click.option("--no-cache", is_flag=True, help="Keep no SVD, and use none that is kept.")
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where SVDs of W are computed: cpu, cuda, cuda:1 …",
)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable, everything.")
@options.reading
def command(
    adapter: str,
    base: str,
    modules: tuple[str, ...],
    top: int,
    threshold: float,
    remove: float | None,
    output: Path | None,
    uniform: bool,
    dtype: str,
    allow_loss: bool,
    overwrite: bool,
    dry_run: bool,
    cache: Path | None,
    cache_limit: str,
    no_cache: bool,
    device: str,
    as_json: bool,
    **reading: Any,
) -> None:
    """Find the leading singular directions of W + ΔW that no singular direction of W resembles (arXiv 2410.21228).

    The score of a direction is the largest |cosine| of its left singular vector with those of W; below --threshold it
    is an intruder. Nearly every random direction is one, as the column "chance" says: a low score means spread over
    many directions of W, not unknown to it. No SVD of W + ΔW is taken; that of W is, once, and kept.
    """
    if (remove is None) != (output is None):
        raise click.UsageError("--remove and -o belong together")
    from loralens.analysis.base.intruders import check_plain, find_intruders
    from loralens.core.names import select
    from loralens.errors import place
    from loralens.linalg.device import Device

    store = svd_store(cache, cache_limit, no_cache=no_cache)
    place_of_work = Device.of(device)
    read = options.read_adapter(adapter, reading, base=base)
    with place(adapter):
        names = select(read, modules)
        check_plain(read, names, pairs=remove not in (None, 1))
    if output:
        target.refuse_source(adapter, output, base=base)
        _write(read, {}, output, Rounding(), overwrite=overwrite, dry_run=True)  # not to fail after hours
    weights = options.base_weights(base, {name: read[name] for name in names}).modules
    found: dict[str, Intruders] = {}
    changed: dict[str, Update] = {}
    with closing(decomposed(weights, store, base, place_of_work)) as each:
        for name, W in each:
            with place(adapter), place(name):
                one = find_intruders(read[name], W, top=top, threshold=threshold)
                found[name] = one.without_vectors()
                if remove is not None:
                    changed[name] = _edited(read[name], one, remove, dtype)
    written = None
    if output and remove is not None:
        changed, cost = _rounded(read, changed, dtype, adapter, allow_loss=allow_loss)
        written = _write(read, changed, output, cost, uniform=uniform, overwrite=overwrite, dry_run=dry_run)
    if as_json:
        head = {"loralens": __version__, "adapter": adapter, "base": base, "threshold": threshold, "top": top}
        tail = {"output": {"strength": remove, **written}} if written else {}
        click.echo(json.dumps(head | _record(read, found) | tail))
        return
    _show(f"{adapter} on {base}", read, found, threshold)
    if written:
        say(*_written(written, found, remove))


def svd_store(folder: Path | None, limit: str, *, no_cache: bool) -> "SvdCache | None":
    """Where SVDs of weights are kept between runs; None where they are not to be."""
    from loralens.formats.records.cache import SvdCache, default_folder, size_of

    if no_cache:
        if folder:
            raise click.UsageError("--cache and --no-cache exclude each other")
        return None
    return SvdCache(folder or default_folder(), limit=size_of(limit))


def decomposed(
    weights: "Mapping[str, Weight]", store: "SvdCache | None", base: str, device: "Device"
) -> "Generator[tuple[str, Decomposed], None, None]":
    """The SVD of every weight, one after the other: read where it is kept, else computed, and said before the first."""
    from loralens.cli.progress import progress
    from loralens.errors import FormatError, place
    from loralens.formats.records.cache import digest
    from loralens.linalg.rank_update import decompose

    keys = {}
    with place(base):
        with progress("reading the base", len(weights)) as advance:
            for name, weight in weights.items():
                with place(name):
                    keys[name] = digest(weight)
                if advance:
                    advance(1)
        missing = [name for name in weights if store is None or keys[name] not in store]
        _announce([weights[name] for name in missing], store, device)
        work = {name: svd_work(weight) * (1 + KEPT * (name in missing)) for name, weight in weights.items()}
        with progress("working on the base", sum(work.values())) as advance:
            for name, weight in weights.items():
                W = store.read(keys[name], weight.shape) if store else None
                if W is None:
                    if name not in missing:
                        say(f"warning: the SVD kept for {name} is damaged: computed again", err=True)
                    with place(name):
                        W = decompose(weight.read(), device)
                    try:
                        if store:
                            store.write(keys[name], W)
                    except FormatError as error:
                        say(*f"warning: {error.at('the SVDs are not kept')}".splitlines(), err=True)
                        store = None
                yield name, W
                if advance:
                    advance(work[name])


def svd_work(weight: "Weight") -> int:
    """What a dense SVD costs, max·min² of the shape."""
    return max(weight.shape) * min(weight.shape) ** 2


def _announce(weights: "Sequence[Weight]", store: "SvdCache | None", device: "Device") -> None:
    """What the missing SVDs will take, on stderr."""
    if not weights:
        return
    from loralens.cli.table import count, size
    from loralens.formats.records.cache import nbytes

    seconds = sum(map(svd_work, weights)) * seconds_a_product(device)
    total = sum(map(nbytes, weights))
    words = f"the SVD of {count(len(weights), 'weight')} of the base comes first: about {duration(seconds)}"
    if store:
        words += f", and {size(total)} kept in {store.folder} for the next time"
        if total > store.limit:
            words += f" as far as the limit of {size(store.limit)} goes (--cache-limit)"
    say(words, err=True)


def seconds_a_product(device: "Device") -> float:
    """Seconds that a dense SVD takes here, over max·min² of its shape."""
    from time import perf_counter

    import numpy as np

    from loralens.linalg.rank_update import decompose

    W = np.random.default_rng(0).standard_normal((SAMPLE, SAMPLE))
    times = []
    for _ in range(2):  # the first one also warms up
        start = perf_counter()
        decompose(W, device)
        times.append(perf_counter() - start)
    return min(times) / SAMPLE**3


def duration(seconds: float) -> str:
    """Seconds, in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _edited(module: "Update", found: "Intruders", strength: float, dtype: str) -> "Update":
    """The module without its intruders: in float64 where it is to be rounded, once, when all modules are there."""
    from loralens.analysis.base.intruders import remove_intruders

    return remove_intruders(module, found, strength=strength, dtype="float32" if dtype == "f32" else "float64")


def _rounded(
    adapter: "Adapter", edited: "Mapping[str, Update]", dtype: str, path: str, *, allow_loss: bool
) -> "tuple[dict[str, Update], Rounding]":
    """The edited modules that are others now, their factors rounded once to ``dtype``, and what that cost them."""
    from loralens.errors import place

    exact = replace(adapter, modules={name: module for name, module in edited.items() if module is not adapter[name]})
    with place(path):
        rounded = target.narrowed(exact, dtype).modules
        return dict(rounded), Rounding.between(exact, rounded, allow_loss=allow_loss, dtype=dtype)


def _write(
    adapter: "Adapter",
    changed: "Mapping[str, Update]",
    output: Path,
    cost: Rounding,
    *,
    uniform: bool = False,
    overwrite: bool,
    dry_run: bool,
) -> dict[str, Any]:
    """Write the changed adapter in its own dialect, or PEFT's where that cannot be written; a record of it."""
    from loralens.analysis.base.intruders import replaced
    from loralens.formats import FORMATS, QUANTISED, save

    new = replaced(adapter, changed, uniform=uniform)
    writable = any(form.name == adapter.format != QUANTISED and form.writer for form in FORMATS)
    form = adapter.format if writable else "peft"
    save(new, output, format=form, overwrite=overwrite, dry_run=dry_run)
    ranks = [module.rank for module in new.modules.values()]
    return {
        "path": str(output),
        "format": form,
        "dry_run": dry_run,
        "modules": len(new),
        "changed": len(changed),
        "ranks": [min(ranks), max(ranks)],
        "parameters": new.parameters,
        "rounding": cost.record(),
    }


def _written(written: Mapping[str, Any], found: Found, strength: float | None) -> list[str]:
    from loralens.cli.table import count

    low, high = written["ranks"]
    worst = written["rounding"]["worst"]
    cost = [str(Rounding(written["rounding"]["error"], worst["error"], worst["module"]))] if worst else []
    shrunk = count(sum(one.count for one in found.values()) if strength != 1 else 0, "intruder")
    what = (
        f"{'would write' if written['dry_run'] else 'wrote'} {written['path']}: {written['format']}, {shrunk} "
        f"scaled by {strength:g}, {written['changed']} of {written['modules']} modules changed, "
        f"rank {low if low == high else f'{low}–{high}'}"
    )
    return [*cost, what]


def _record(adapter: "Adapter", found: Found) -> dict[str, Any]:
    looked, count, share = _total(found)
    return {
        "modules": [
            {
                "name": name,
                "shape": list(one.shape),
                "rank": adapter[name].rank,
                "count": one.count,
                "energy_share": one.energy_share,
                "chance": one.chance,
                "random_score": one.random_score,
                "singular_values": one.s.tolist(),
                "scores": one.scores.tolist(),
                "intruders": [
                    {"index": int(j) + 1, "singular_value": float(one.s[j]), "score": float(one.scores[j])}
                    for j in one.indices
                ],
                "tied": one.tied,
                "method": one.method,
            }
            for name, one in found.items()
        ],
        "total": {"modules": len(found), "directions": looked, "count": count, "energy_share": share},
    }


def _total(found: Found) -> tuple[int, int, float]:
    """Directions looked at, intruders among them, and their share of the energy, over several modules."""
    energy = sum(float((one.s**2).sum()) for one in found.values())
    intruding = sum(float((one.s[one.indices] ** 2).sum()) for one in found.values())
    share = intruding / energy if energy else 0.0
    return sum(one.s.size for one in found.values()), sum(one.count for one in found.values()), share


def _show(place: str, adapter: "Adapter", found: Found, threshold: float) -> None:
    from loralens.cli.table import show

    show(_modules_table(place, adapter, found, threshold), _kinds_table(found))
    tied = [name for name, one in found.items() if one.tied]
    if tied:
        say(f"tied: {len(tied)} modules have equal leading singular values, {tied[0]} first; their vectors, and")
        click.echo("  so their scores and counts, are not unique")
    dense = sum(one.method == "dense" for one in found.values())
    if dense:
        say(f"dense: {dense} modules needed a dense SVD, as Lanczos did not converge in time")


def _modules_table(place: str, adapter: "Adapter", found: Found, threshold: float) -> "Table":
    from loralens.cli.table import Column, Table, count, number

    heads = ("out × in", "r", "intruders", "energy", "first", "its σ", "its score", "lowest", "random", "chance")
    rows = []
    for name, one in found.items():
        first = int(one.indices[0]) if one.count else None
        rows.append(
            [
                name,
                f"{one.shape[0]} × {one.shape[1]}",
                str(adapter[name].rank),
                f"{one.count}/{one.s.size}",
                f"{one.energy_share:.1%}",
                "" if first is None else str(first + 1),
                "" if first is None else number(one.s[first]),
                "" if first is None else f"{one.scores[first]:.3f}",
                f"{one.scores.min(initial=1.0):.3f}",
                f"{one.random_score:.3f}",
                f"{one.chance:.4g}",
            ]
        )
    looked, intruding, share = _total(found)
    title = (
        f"{place}: {count(len(found), 'module')}, {intruding} of {looked} leading directions of W + ΔW are intruders "
        f"(score below {threshold:g}), with {share:.1%} of their energy"
    )
    return Table(title, [Column("module", "left"), *map(Column, heads)], rows)


def _kinds_table(found: Found) -> "Table":
    from loralens.cli.table import Column, Table
    from loralens.core.names import kind, natural_key

    members: dict[str, dict[str, Intruders]] = {}
    for name, one in found.items():
        members.setdefault(kind(name), {})[name] = one
    rows = []
    for label in sorted(members, key=natural_key):
        looked, count, share = _total(members[label])
        rows.append([label, str(len(members[label])), f"{count}/{looked}", f"{share:.1%}"])
    return Table("by kind", [Column("kind", "left"), *map(Column, ("modules", "intruders", "energy"))], rows)
