"""The verb ``fleet``: makes, updates and opens indexes for the sub-commands of ``loralens fleet``.

What the sub-commands answer are methods of `loralens.Fleet`.
"""

from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loralens.core.messages import note
from loralens.errors import OptionError
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
        Measure the files in this many processes; by default one for each processor if there are many files, and in
        threads of this one otherwise.
    dask : str, optional
        The address of a Dask scheduler, whose workers measure the files. They need the same disk.
    once : bool
        As in `loralens.load`.

    Raises
    ------
    OptionError
        ``folder`` is not a folder, another process updates the index, or there is no scheduler at the address.
    """
    from loralens.fleet.indexing.updating import update_index

    home = Fleet.open(folder if output is None else output).home
    with _dask_executor(dask) as executor:
        return update_index(home, Path(folder), executor, jobs=jobs, once=once, spawning=True)


@contextmanager
def _dask_executor(address: str | None) -> Iterator[Executor | None]:
    """The executor of a Dask scheduler; None without an address.

    Raises
    ------
    OptionError
        There is no scheduler at the address, or it ends while it is used.
    """
    if address is None:
        yield None
        return
    try:
        from distributed import Client
        from distributed.comm import CommClosedError
    except ImportError as error:
        raise missing_packages("--dask", ["distributed"], error) from error
    try:
        client: Any = Client(address)  # type: ignore[no-untyped-call, unused-ignore]
    except (OSError, ValueError) as error:
        what = f"there is no Dask scheduler at {address}"
        raise OptionError(what, fix="give the address that it prints at its start: tcp://HOST:PORT") from error
    # They would log tracebacks of a lost connection, which is one message here.
    loggers = [getLogger(name) for name in ("distributed", "distributed.client")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(CRITICAL)
    try:
        with client:
            yield client.get_executor(pure=False)
    # The tasks are cancelled when the connection is lost.
    except (CancelledError, CommClosedError) as error:
        raise OptionError(
            f"the Dask scheduler at {address} has ended, or cannot be reached any more",
            fix="start it again and repeat the command; fleet index keeps what was measured",
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
        note(f"{fleet.home}: the files have changed since they were indexed: {counts}", fix=fleet.index_command)
    return fleet
