"""`expand_adapter`: one adapter of a compressed fleet."""

from dataclasses import replace
from os import PathLike
from pathlib import Path

from loralens.choices import TARGET_FORMATS, TargetFormat
from loralens.compression.loss import losses, total_error
from loralens.core.adapter import Adapter
from loralens.errors import FormatError, MismatchError, place
from loralens.fleet.joint.result import ExpansionResult
from loralens.formats import encode_adapter
from loralens.formats.files.apart import check_apart
from loralens.formats.files.container import Stored
from loralens.formats.files.writing import write_files
from loralens.formats.records.fleets.reader import FleetFile

TARGETS = ("target_modules", "target_parameters")  # the fields of a configuration that name what is adapted


def expand_adapter(
    source: str | PathLike[str] | FleetFile,
    name: str,
    output: str | PathLike[str] | None = None,
    *,
    rank: int | None = None,
    to: TargetFormat = "peft",
    overwrite: bool = False,
) -> ExpansionResult:
    """Take one adapter out of a compressed fleet, and write it.

    Parameters
    ----------
    source : path or FleetFile
        The file that `compress_fleet` wrote; an open one keeps the bases of the last groups in memory.
    name : str
        The name of the adapter in the fleet.
    output : path, optional
        The folder to write. Without it nothing is written, and the result holds the adapter.
    rank : int, optional
        The largest rank of a module. By default every module has the rank that it had before.
    to : str
        The dialect to write.

    Raises
    ------
    OptionError
        There is no such adapter, the rank is not positive, or the target exists.
    FormatError
        The file is damaged, or the dialect cannot hold something of the adapter.
    """
    file = source if isinstance(source, FleetFile) else FleetFile(source)
    adapter, truncation = file.adapter(name, rank=rank), 0.0
    if rank is not None:
        truncation = total_error(losses(file.adapter(name), adapter))
    if output is not None:
        target = Path(output)
        check_apart(target, [("the fleet", file.path)])
        try:
            with place(target):
                stored, files = encode_adapter(adapter, to)
            write_files(_with_targets(stored, adapter), target, files=files, overwrite=overwrite)
        except (FormatError, MismatchError) as error:
            # The advice of the writers is about options of `convert`.
            if adapter.format in TARGET_FORMATS and adapter.format != to:
                error.fix = f"write it in the dialect that it had: give --to {adapter.format} (to={adapter.format!r})"
            raise
    return ExpansionResult(
        file.path, name, adapter, file.entry(name).error, truncation, None if output is None else Path(output)
    )


def _with_targets(stored: Stored, adapter: Adapter) -> Stored:
    """The files with the targets that the configuration of the source names.

    The writer adds a module that the configuration does not name, since PEFT would leave out new numbers of it. The
    numbers here are in place of others that it has left out too, so the configuration of the source is as right as it
    was.
    """
    old, new = adapter.config, stored.config
    if old is None or new is None:
        return stored
    # The writer also adds empty fields.
    before, after = (
        {key: value for key, value in config.items() if key not in TARGETS and value not in ({}, None)}
        for config in (old, new)
    )
    return replace(stored, config=old) if before == after else stored
