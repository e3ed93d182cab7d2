"""The verb ``fleet``: makes, updates and opens indexes for the sub-commands of ``loralens fleet``.

What the sub-commands answer are methods of `loralens.Fleet`.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.core.messages import command_line, note
from loralens.fleet.fleet import Fleet
from loralens.requirements import missing_packages

if TYPE_CHECKING:
    from loralens.fleet.indexing.update_result import UpdateResult


def index_fleet(
    folder: str | PathLike[str],
    *,
    output: str | PathLike[str] | None = None,
    jobs: int | None = None,
    dask: str | None = None,
    allow_pickle: bool = False,
    once: bool = False,
) -> "UpdateResult":
    """Make or update the index of the adapters under a folder.

    Parameters
    ----------
    folder : path
        The folder of the adapters.
    output : path, optional
        The folder of the index; by default ``.loralens-fleet`` in ``folder``.
    jobs : int, optional
        Measure the files in this many processes; by default in threads of this one.
    dask : str, optional
        The address of a Dask scheduler, whose workers measure the files. They need the same disk.
    allow_pickle, once : bool
        As in `loralens.load`.

    Raises
    ------
    OptionError
        ``folder`` is not a folder, another process updates the index, or there is no scheduler at the address.
    """
    fleet = Fleet.open(folder if output is None else output)
    if dask is None:
        return fleet.update(folder, jobs=jobs, allow_pickle=allow_pickle, once=once)
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_packages("--dask", ["distributed"], error) from error
    with Client(dask) as client:
        executor = client.get_executor(pure=False)
        return fleet.update(folder, executor, allow_pickle=allow_pickle, once=once)


def open_fleet(home: str | PathLike[str]) -> Fleet:
    """Open an index for a question, and note whether the files have changed since it was made.

    Raises
    ------
    OptionError
        There is no index, or another version made it.
    FormatError
        It is damaged.
    """
    fleet = Fleet.open(home)
    changes = fleet.changes()
    if changes:
        counts = ", ".join(f"{number} {kind}" for kind, number in changes.items())
        index = Path(fleet.home)
        words = ["loralens", "fleet", "index", str(fleet.root)]
        if index.parent.resolve() != fleet.root.resolve():
            words += ["-o", str(index)]
        note(f"{fleet.home}: the files have changed since they were indexed: {counts}", fix=command_line(*words))
    return fleet
