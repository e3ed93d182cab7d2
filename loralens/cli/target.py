"""Where an adapter goes, for every command that writes one: what is refused before any work."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from loralens.cli import options

if TYPE_CHECKING:  # keeps numpy out of --help
    from loralens.core.adapter import Adapter


def require(output: Path | None, *, dry_run: bool) -> None:
    """Refuse to work for a target that was not given, as wrong usage."""
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o': say where to write, or give --dry-run")


def check_writable(output: Path, to: str, *, overwrite: bool) -> None:
    """Refuse a target to which a file of the dialect ``to`` cannot be written."""
    from loralens.formats import FORMATS
    from loralens.formats.files.container import Stored
    from loralens.formats.files.writing import write_files

    files = next(form.files for form in FORMATS if form.name == to)
    assert files
    write_files(Stored({}), output, files=files, overwrite=overwrite, dry_run=True)


def check_known(adapter: "Adapter", to: str) -> None:
    """Refuse to carry on what is not known: a strength that the target has to state, an order of rows."""
    from loralens.errors import OptionError

    if to != "gguf" and any(finding.code == "rows-permuted" for finding in adapter.findings):
        raise OptionError(
            "rows of q and k are in llama.cpp's order, and the file does not say the head counts", fix="give --base DIR"
        )
    unknown = any(finding.code == "alpha-unknown" for finding in adapter.findings)
    if unknown and to != "loralib":
        raise OptionError(
            f"the file does not say its α, and {to} has to", fix="give --alpha or --scale, as the training code has it"
        )


def refuse_source(
    source: str, output: Path, *, base: str | None = None, others: Mapping[str, str | None] | None = None
) -> None:
    """Refuse a target that is the source, file or folder, or a file beside it whose configuration would be its own.

    Nor may it hold the source, the base or other inputs (by what they are called), or lie in one. A file may lie beside
    the source: a GGUF file says all of itself.
    """
    from loralens.errors import OptionError
    from loralens.formats.files.apart import adapter_inputs, check_apart
    from loralens.formats.files.location import SUFFIXES, adapter_file, config_beside

    file = adapter_file(Path(source))
    if output.exists() and (output.samefile(file) or output.samefile(file.parent)):
        raise OptionError(
            f"{output} is where the source is", fix="choose another target: a source is never written over"
        )
    config = config_beside(file)
    shares = output.suffix in SUFFIXES and output.suffix != ".gguf"  # which says all of itself
    if config and shares and output.parent.is_dir() and output.parent.samefile(file.parent):
        raise OptionError(
            f"{output} would share {config.name} with the source, and one of them be read wrongly",
            fix="choose another folder",
        )
    check_apart(output, adapter_inputs(source), within=output.suffix not in SUFFIXES)
    refuse_inputs(output, {"the base": base, **(others or {})})


def refuse_inputs(output: Path, inputs: Mapping[str, str | None]) -> None:
    """Refuse a target that is one of the inputs that were given (by what they are called), holds one or lies in one."""
    from loralens.formats.files.apart import check_apart
    from loralens.formats.models.checkpoint import resolved

    check_apart(
        output, [(what, place) for what, path in inputs.items() if path for place in (Path(path), resolved(Path(path)))]
    )


def of_format(to: str, base: Path | None, arch: str | None = None) -> dict[str, Any]:
    """Options that only one dialect has."""
    if to not in ("gguf", "mlx"):
        return {}
    from loralens.formats.models.checkpoint import model_config

    config = {"base_config": model_config(base) if base else None}
    return {"arch": arch, **config} if to == "gguf" else config


def narrowed(adapter: "Adapter", dtype: str | None) -> "Adapter":
    """The adapter, its factors rounded once to ``dtype`` where one was given; a module that is no pair is refused."""
    wanted = options.dtype_of(dtype)
    if wanted is None:
        return adapter
    from loralens.compression.directions import named, narrowed

    modules = {name: narrowed(module, wanted) for name, module in adapter.items()}
    changed = {name: named(name, new) for name, new in modules.items() if new is not adapter[name]}
    return replace(adapter, modules={**modules, **changed})
