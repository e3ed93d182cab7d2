"""``loralens convert``: an adapter in another dialect, under other names, or in another dtype."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options, target

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter
    from loralens.core.structured import Update

TARGETS = ("peft", "kohya", "diffusers", "comfyui", "mlx", "loralib", "gguf", "loralens-q")


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
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    **reading: Any,
) -> None:
    """Write SOURCE in another dialect.

    Scales and names that the target cannot say are recorded in its metadata, so loralens reads its own files back
    without --base or --alpha. What the target cannot hold is folded into the factors where that is exact, and refused
    by name where it is not. SOURCE is never written over.
    """
    from loralens.errors import place
    from loralens.formats import load

    adapter = load(source, base=base, **reading)
    options.warn(source, adapter)
    with place(source):
        target.check_known(adapter, to)
        adapter, words = _renamed(adapter, base, prefix)
        adapter = target.narrowed(_paired(adapter, rank), dtype)
        if drop_extra:
            words.append(f"left out {len(adapter.extra)} tensors that are half of no pair")
            adapter = replace(adapter, extra={})
    target.refuse_source(source, output)
    report = _write(adapter, output, to, overwrite=overwrite, dry_run=dry_run, **target.of_format(to, base, arch))
    if as_json:
        click.echo(json.dumps({"source": source, "target": str(output), "format": to, "notes": words, **report}))
        return
    for word in words:
        click.echo(word)
    click.echo(f"{'would write' if dry_run else 'wrote'} {output}: {to}, {report['modules']} modules")


def _renamed(adapter: "Adapter", base: Path | None, prefixes: tuple[str, ...]) -> "tuple[Adapter, list[str]]":
    """The adapter under the names of the base, then under the prefixes asked for; and what was done, in words."""
    words = []
    if base:
        from loralens.core.matching import match
        from loralens.formats.checkpoint import shapes

        found = match({name: module.shape for name, module in adapter.items()}, shapes(base))
        words.append(str(found))
        if found.edit and not found.by_storage:  # which are names of files, and not of modules
            adapter = adapter.renamed({name: _module_name(name, key) for name, key in found.keys.items()})
    for pair in prefixes:
        adapter = adapter.renamed(_prefixed(adapter, pair))
    return adapter, words


def _module_name(name: str, key: str) -> str:
    """The module of a weight's key, with the expert's number that the old name has."""
    bracket = name[name.rindex("[") :] if name.endswith("]") else ""
    return key.removesuffix(".weight") + bracket


def _prefixed(adapter: "Adapter", pair: str) -> Mapping[str, str]:
    from loralens.errors import OptionError

    old, equals, new = pair.partition("=")
    names = {name: new + name[len(old) :] for name in adapter if name.startswith(old)}
    if not equals or not names:
        first = next(iter(adapter), "nothing")
        what = f"matches nothing; the first name is {first}" if equals else "is not OLD=NEW"
        raise OptionError(f"--prefix {pair} {what}", fix="give a prefix that modules have: --prefix unet.=transformer.")
    return names


def _paired(adapter: "Adapter", rank: int | None) -> "Adapter":
    """Structured modules as their nearest pairs of a rank, where one was given."""
    from loralens.core.structured import Structured
    from loralens.errors import OptionError

    if rank and not any(isinstance(module, Structured) for module in adapter.modules.values()):
        raise OptionError("--rank is for modules that are no pair yet, and here all are", fix="leave out --rank")

    def pair(module: "Update") -> "Update":
        return module.truncated(min(rank, *module.shape)) if rank and isinstance(module, Structured) else module

    return adapter.map(pair)


def _write(
    adapter: "Adapter", output: Path, to: str, *, overwrite: bool, dry_run: bool, **of_format: Any
) -> dict[str, Any]:
    from loralens.formats import save

    save(adapter, output, format=to, overwrite=overwrite, dry_run=dry_run, **of_format)
    return {"modules": len(adapter), "parameters": sum(m.parameters for m in adapter.modules.values())}
