"""Reading the catalogue: the rows as members, the files that cannot be read, and signatures."""

import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError
from loralens.fleet.catalogue.members import Member, Signature, Unreadable
from loralens.fleet.catalogue.schema import index_command, open_to_read
from loralens.fleet.catalogue.slots import SlotHold, damaged_slots, read_slots
from loralens.fleet.sketching.sketches import WIDTH, PickedRows, Sketches

_MEMBER = """select number, slot, name, path, real, bytes, format, base, inferred, signature, modules, zero_modules,
    extras, ranks, scales, parameters, frobenius, effective_rank, fingerprint, findings, added, stamp, checksum, step
    from files where status = 'adapter' order by name, number"""
TRIES = 3  # how often a state is read again that was changed while it was read


@final
@dataclass(frozen=True, slots=True)
class FleetState:
    """One committed state of an index.

    Attributes
    ----------
    commit : int
        Its number.
    root : Path
        The folder of the adapters.
    stamps : mapping of int to str
        Number of a member → the stamp of its file when it was measured.
    settings : str
        How the files were read.
    """

    commit: int
    root: Path
    members: tuple[Member, ...]
    unreadable: tuple[Unreadable, ...]
    sketches: Sketches
    stamps: Mapping[int, str]
    settings: str


class CatalogueSummary(NamedTuple):
    """The folder of the adapters, how many there are, how many files hold no LoRA pairs, and what cannot be read."""

    root: Path
    adapters: int
    others: int
    unreadable: tuple[Unreadable, ...]


def commit_number(home: Path) -> int:
    """The number of the last commit."""
    with open_to_read(home) as connection:
        return _commit(connection)


def _commit(connection: sqlite3.Connection) -> int:
    row = connection.execute("select value from state where key = 'commit'").fetchone()
    return int(row[0]) if row else 0


def read_root(connection: sqlite3.Connection, home: Path) -> Path | None:
    """The folder of the adapters; None in a new index."""
    row = connection.execute("select value from state where key = 'root'").fetchone()
    # A root that contains the index is stored relative to it, so that both can be moved together.
    return Path(os.path.normpath(home / name_of(row[0]))) if row else None


def read_state(home: Path) -> FleetState:
    """The last committed state.

    Raises
    ------
    FormatError
        A sketch is damaged.
    """
    damaged: list[int] = []
    for _ in range(TRIES):
        hold = SlotHold(home)
        with open_to_read(home) as connection:
            connection.execute("begin")
            commit = _commit(connection)
            root = read_root(connection, home) or home
            rows = connection.execute(_MEMBER).fetchall()
            unreadable = _read_unreadable(connection, root)
            settings = connection.execute("select value from state where key = 'reading'").fetchone()
        slots = read_slots(home)
        # A copy cannot change after the check of its checksums.
        slots = slots if hold.is_held else np.array(slots)
        damaged = damaged_slots(slots, {row[1]: row[-2] for row in rows})
        if not damaged:
            members = tuple(_sound_member(row, root, home) for row in rows)
            stamps = {row[0]: row[-3] for row in rows}
            return FleetState(
                commit, root, members, unreadable, _sketches(slots, hold, rows), stamps, settings[0] if settings else ""
            )
        # A writer may have used a slot again that was freed after the rows were read.
        if commit == commit_number(home):
            break
    names = [row[2] for row in rows if row[1] in set(damaged)]
    raise FormatError(
        f"{home}: the sketches of {len(damaged)} adapters are damaged, such as that of {name_of(names[0])}",
        fix=f"index again: {index_command(home, root)}",
    )


def check_catalogue(home: Path) -> None:
    """Refuse a catalogue that is damaged, or has rows that no update can have written; sketches are not looked at."""
    with open_to_read(home) as connection:
        sound = connection.execute("pragma quick_check").fetchone()[0] == "ok"
        rows = connection.execute(_MEMBER).fetchall()
        root = read_root(connection, home) or home
    for row in rows:
        _sound_member(row, root, home)
    if not sound:
        raise FormatError(f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}")


def read_summary(home: Path) -> CatalogueSummary:
    """What the catalogue holds; no sketch is looked at."""
    with open_to_read(home) as connection:
        root = read_root(connection, home) or home
        counted = dict(connection.execute("select status, count(*) from files group by status"))
        unreadable = _read_unreadable(connection, root)
        return CatalogueSummary(root, counted.get("adapter", 0), counted.get("other", 0), unreadable)


def _sketches(slots: NDArray[np.int8], hold: SlotHold, rows: list[tuple[Any, ...]]) -> Sketches:
    """The sketches in the order of the rows."""
    order = np.array([row[1] for row in rows], np.intp)
    steps = np.array([row[-1] for row in rows], np.float64)
    codes, starts = (PickedRows(slots, order, side, hold) for side in (slice(WIDTH), slice(WIDTH, None)))
    return Sketches(codes, steps, starts)


def _sound_member(row: tuple[Any, ...], root: Path, home: Path) -> Member:
    """The member of a row; a row that no update can have written is refused, since an index may come from anywhere."""
    try:
        if _leads_out(name_of(row[3])):
            raise ValueError
        return _member(row, root)
    except (ValueError, TypeError) as error:
        raise FormatError(
            f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}"
        ) from error


def _leads_out(path: str) -> bool:
    """Whether a path may lead out of the folder that it is joined to."""
    drive, path_on_drive = os.path.splitdrive(path)
    return (
        bool(drive) or path_on_drive.startswith(("/", "\\")) or os.pardir in path_on_drive.replace("\\", "/").split("/")
    )


def _member(row: tuple[Any, ...], root: Path) -> Member:
    (number, slot, name, path, real, size, form, base, inferred, signature, modules, zero, extras, ranks, scales,
     parameters, norm, effective, fingerprint, findings, added, _, _, _) = row  # fmt: skip
    return Member(
        number, slot, name_of(name), root / name_of(path), name_of(real), size, form, base, inferred, signature,
        modules, zero, extras, _values(ranks), _values(scales), parameters, norm, effective, fingerprint,
        _values(findings), added,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _values(text: str) -> tuple[Any, ...]:
    """A list that is stored as JSON; most adapters of a fleet have the same few lists of ranks, scales and findings."""
    return tuple(json.loads(text))


def read_others(home: Path, root: Path) -> tuple[Unreadable, ...]:
    """The files that hold tensors and no LoRA pairs, with the reason why they are not adapters."""
    with open_to_read(home) as connection:
        return _read_unreadable(connection, root, status="other")


def _read_unreadable(
    connection: sqlite3.Connection, root: Path, *, status: str = "unreadable"
) -> tuple[Unreadable, ...]:
    rows = connection.execute(
        "select name, path, bytes, reason, fix from files where status = ? order by name, number", [status]
    )
    return tuple(
        Unreadable(name_of(name), root / name_of(path), size, reason, fix) for name, path, size, reason, fix in rows
    )


def read_signature(home: Path, digest: str) -> Signature:
    """The names and shapes that a digest stands for."""
    with open_to_read(home) as connection:
        row = connection.execute("select modules from signatures where signature = ?", [digest]).fetchone()
    if row is None:
        raise FormatError(f"{home}: the signature {digest} is missing", fix=f"index again: {index_command(home)}")
    return to_signature(row[0])


def to_signature(text: str) -> Signature:
    """A signature as the catalogue stores it: a list of key, name and shape of every module."""
    modules = json.loads(text)
    return Signature(
        tuple(key for key, *_ in modules),
        tuple(name for _, name, *_ in modules),
        tuple((out, in_) for *_, out, in_ in modules),
    )


def read_stamps(home: Path) -> dict[str, str]:
    """Path → stamp of every file when it was measured."""
    with open_to_read(home) as connection:
        return {name_of(path): stamp for path, stamp in connection.execute("select path, stamp from files")}


def read_norms(home: Path, member: Member) -> Mapping[str, float]:
    """Key → ‖ΔW‖_F of the modules of a member."""
    with open_to_read(home) as connection:
        row = connection.execute("select norms from files where number = ?", [member.number]).fetchone()
    if row is None or row[0] is None:
        raise FormatError(f"{member.path}: is not in the index any more", fix="take the members of the fleet anew")
    return dict(zip(read_signature(home, member.signature).keys, json.loads(row[0]), strict=True))


def stored_name(name: str) -> str | bytes:
    """A path as the catalogue stores it: text, or the bytes of a path that is not text."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name)
    return name


def name_of(stored: object) -> str:
    """A path that the catalogue has stored."""
    return os.fsdecode(stored) if isinstance(stored, bytes) else str(stored)
