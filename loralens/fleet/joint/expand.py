"""`expand_adapter`: one adapter of a compressed fleet."""

from os import PathLike
from pathlib import Path

from loralens.choices import TARGET_FORMATS, TargetFormat
from loralens.compression.loss import losses, total_error
from loralens.errors import FormatError, MismatchError
from loralens.fleet.joint.result import ExpansionResult
from loralens.formats import save
from loralens.formats.files.apart import check_apart
from loralens.formats.records.fleets.reader import FleetFile


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
            save(adapter, target, format=to, overwrite=overwrite)
        except (FormatError, MismatchError) as error:
            # The advice of the writers is about options of `convert`.
            if adapter.format in TARGET_FORMATS and adapter.format != to:
                error.fix = f"write it in the dialect that it had: give --to {adapter.format} (to={adapter.format!r})"
            raise
    return ExpansionResult(
        file.path, name, adapter, file.entry(name).error, truncation, None if output is None else Path(output)
    )
