"""``loralens convert``: an adapter in another dialect, under other names, or in another dtype."""

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options, rounding, target
from loralens.cli.compress_form import FEW
from loralens.cli.terminal import say
from loralens.verbs.outputs.form import TARGET_FORMATS

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter
    from loralens.core.naming.matching import Match, Shape
    from loralens.core.structured import Update
    from loralens.formats.files.container import Files, Stored

KEEPING = ("peft", FEW)  # dialects that have a place for tensors saved in full
BITS = 8  # of a number in it, as its writer has it by default

TARGETS = TARGET_FORMATS


@click.command("convert")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="TARGET", help="File or folder to write."
)
@click.option("--to", type=click.Choice(TARGETS), required=True, help="The dialect to write.")
@click.option(
    "--base", type=click.Path(path_type=Path), metavar="DIR", help="The base model: its weights' names, headers only."
)
@click.option("--arch", metavar="NAME", help="Architecture for GGUF, where --base does not say it: llama, qwen2 …")
@click.option(
    "--dtype", type=click.Choice(list(options.DTYPES)), help="Round the factors to this. [default: as they are]"
)
@click.option("--prefix", multiple=True, metavar="OLD=NEW", help="Rename modules that begin with OLD. Repeatable.")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of modules that are no pair yet (LoKr, LoHa, full).")
@click.option("--drop-extra", is_flag=True, help="Leave out what the target has no place for.")
@rounding.ALLOW_LOSS
@click.option("--overwrite", is_flag=True, help="Replace TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what would be written, and write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Machine-readable report.")
@options.reading
def command(
    source: str,
    output: Path,
    to: str,
    base: Path | None,
    arch: str | None,
    dtype: str | None,
    prefix: tuple[str, ...],
    rank: int | None,
    drop_extra: bool,
    allow_loss: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Write SOURCE in another dialect.

    Scales and names that the target cannot say are recorded in its metadata, so loralens reads its own files back
    without --base or --alpha. What the target cannot hold is folded into the factors where that is exact, and refused
    by name where it is not. What --rank cuts off, and what rounding costs (--dtype, loralens-q, a scale that is folded
    in), is said. SOURCE is never written over.
    """
    from loralens.errors import place
    from loralens.formats.files.writing import write_files

    adapter = options.read_adapter(source, reading, base=base)
    with place(source):
        target.check_known(adapter, to)
        adapter, words = _renamed(adapter, base, prefix, to)
        adapter = _with_magnitudes(adapter, base, words)
        if drop_extra:
            words.append(f"left out {len(adapter.extra)} tensors that are half of no pair")
            adapter = replace(adapter, extra={})
        pairs, truncation = _paired(adapter, rank)
        narrow = rounding.quantised(pairs, BITS) if to == FEW else target.narrowed(pairs, dtype)
    target.refuse_source(source, output, base=str(base) if base else None)
    with place(source):
        of_format = target.of_format(to, base, arch)
        exact = _named_as_in(pairs, to, of_format)
        stored, files, back = _stored(narrow, to, exact, of_format)
        cost = rounding.Rounding.between(exact, back, allow_loss=allow_loss or to == FEW, dtype=dtype)
    write_files(stored, output, files=files, overwrite=overwrite, dry_run=dry_run)
    report = {
        "modules": len(adapter),
        "parameters": sum(module.parameters for module in narrow.modules.values()),
        "truncation": truncation,
        "rounding": cost.record(),
        "bits": BITS if to == FEW else None,
    }
    if as_json:
        click.echo(json.dumps({"source": source, "target": str(output), "format": to, "notes": words, **report}))
        return
    for word in (*words, *_losses(truncation, cost, rank, to)):
        say(word)
    say(f"{'would write' if dry_run else 'wrote'} {output}: {to}, {report['modules']} modules")


def _renamed(adapter: "Adapter", base: Path | None, prefixes: tuple[str, ...], to: str) -> "tuple[Adapter, list[str]]":
    """The adapter under the names of the base, then under the prefixes asked for; and what was done, in words.

    Of tensors saved in full those that are the base's own are left out, where the target is not one that keeps all.
    """
    words = []
    if base:
        from loralens.core.naming.matching import match
        from loralens.core.weights import with_kernels
        from loralens.errors import place
        from loralens.formats.dialects.gguf.writer import head_is_tied
        from loralens.formats.models.base_copies import FULL, without_copies
        from loralens.formats.models.checkpoint import shapes, weights

        known = shapes(base)
        tied = _tied_heads(adapter, base, known)
        if tied and to == "gguf":
            with place(next(iter(tied))):
                raise head_is_tied()
        found = match({name: module.shape for name, module in adapter.items() if name not in tied}, known)
        words.append(str(found))
        if tied:
            head = next(iter(tied))
            words.append(f"{head} adapts the base's embedding, which is its head too, and has no weight of its own")
        adapter = with_kernels(adapter, {name: known[key] for name, key in found.keys.items()})
        if to not in KEEPING and any(extra.role in FULL for extra in adapter.extra.values()):
            adapter, copies = without_copies(adapter, weights(base), found.rename)
            words += [f"left out {key}: it is the base's own" for key in copies]
        if found.edit and not found.by_storage:  # which are names of files, and not of modules
            names = {name: _module_name(name, key) for name, key in found.keys.items()}
            adapter = adapter.renamed({**_renamed_extras(adapter, found, known), **names, **tied})
    for pair in prefixes:
        adapter = adapter.renamed(_prefixed(adapter, pair))
    return adapter, words


def _tied_heads(adapter: "Adapter", base: Path, known: "Mapping[str, Shape]") -> dict[str, str]:
    """The modules that adapt a head whose weight the base holds as its embedding alone, and what the head is called."""
    from loralens.formats.models.checkpoint import model_config, resolved
    from loralens.formats.models.model_files import model_files
    from loralens.merging.tying import Tied

    if all(f"{name}.weight" in known for name in adapter):
        return {}
    tied = Tied.of(model_files(resolved(base)).tensors, model_config(base) or {})
    if not (tied.lacks_head and tied.ties.head):
        return {}
    head = tied.ties.head.removesuffix(".weight")
    return {name: head for name in adapter if f".{name}".endswith(f".{head}")}


def _renamed_extras(adapter: "Adapter", found: "Match", known: Collection[str]) -> Mapping[str, str]:
    """The names in the base of modules that the adapter speaks of without a pair: norms, heads."""
    alone = {extra.module for extra in adapter.extra.values()}.difference(adapter)
    names = {name: found.rename(name) for name in alone}
    return {old: new for old, new in names.items() if f"{new}.weight" in known or new in known}


def _with_magnitudes(adapter: "Adapter", base: Path | None, words: list[str]) -> "Adapter":
    """The adapter with the magnitudes of DoRA that its file lacks, where a base is there to make them from."""
    from loralens.arithmetic.dora import filled
    from loralens.core.carried import NORMS

    missing = [one.module for one in adapter.extra.values() if one.role in NORMS]
    if not base or not missing:
        return adapter
    words.append(f"magnitudes of {len(missing)} DoRA modules written as the lengths of the base's weights")
    weights = options.base_weights(str(base), {name: adapter[name] for name in missing})
    return filled(adapter, weights.modules)


def _module_name(name: str, key: str) -> str:
    """The module of a weight's key, with the expert's number that the old name has."""
    bracket = name[name.rindex("[") :] if name.endswith("]") else ""
    return key.removesuffix(".weight") + bracket


def _prefixed(adapter: "Adapter", pair: str) -> Mapping[str, str]:
    from loralens.errors import OptionError

    old, equals, new = pair.partition("=")
    modules = [*adapter, *{extra.module for extra in adapter.extra.values()}.difference(adapter)]
    names = {name: new + name[len(old) :] for name in modules if name.startswith(old)}
    if not equals or not names:
        first = next(iter(adapter), "nothing")
        what = f"matches nothing; the first name is {first}" if equals else "is not OLD=NEW"
        raise OptionError(f"--prefix {pair} {what}", fix="give a prefix that modules have: --prefix unet.=transformer.")
    return names


def _paired(adapter: "Adapter", rank: int | None) -> "tuple[Adapter, float]":
    """Structured modules as their nearest pairs of a rank, where one was given; and what that cost in all, relative."""
    from loralens.core.structured import Structured
    from loralens.errors import OptionError

    wide = [name for name, module in adapter.items() if isinstance(module, Structured)]
    if not rank:
        return adapter, 0.0
    if not wide:
        raise OptionError("--rank is for modules that are no pair yet, and here all are", fix="leave out --rank")
    from loralens.compression.loss import losses, total_error

    def pair(module: "Update") -> "Update":
        return module.truncated(min(rank, *module.shape)) if isinstance(module, Structured) else module

    pairs = adapter.map(pair)
    return pairs, total_error(losses(adapter, pairs, threads=os.cpu_count() or 1))


def _named_as_in(adapter: "Adapter", to: str, of_format: "Mapping[str, Any]") -> "Adapter":
    """The adapter with its experts cut and called as the target has them: what the written file is compared with."""
    from loralens.formats.dialects.experts import as_in

    if adapter.format == to:
        return adapter
    return as_in(to, adapter, base_config=of_format.get("base_config"), arch=of_format.get("arch"))


def _stored(
    adapter: "Adapter", to: str, exact: "Adapter", of_format: "Mapping[str, Any]"
) -> "tuple[Stored, Files, Mapping[str, Update]]":
    """What is written, the files it goes to, and the modules that would be read from it, by the names of ``exact``."""
    from loralens.formats import FORMATS, stored_as

    stored, files = stored_as(adapter, to, **of_format)
    back = next(form for form in FORMATS if form.name == to).read(stored)
    called = {name: file for file, name in stored.names.items()}

    def read(name: str, module: "Update") -> "Update":
        same = back[called.get(name, name)]  # of a dialect that says no scale: our record does
        return same.rescaled(module.scale, module.scaling) if same.scaling.rule == "unknown" else same

    return stored, files, {name: read(name, module) for name, module in exact.items()}


def _losses(truncation: float, cost: rounding.Rounding, rank: int | None, to: str) -> list[str]:
    """What was lost, in words; nothing where the file is exact."""
    from loralens.cli.compress_report import percent

    words = []
    if rank:
        words.append(f"truncation  ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(truncation)} over all modules: what rank {rank} leaves out")
    if cost.worst:
        words.append(f"{cost}{f', {BITS} bits a number' if to == FEW else ''}")
    return words
