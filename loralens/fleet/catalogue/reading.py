"""Reading the catalogue: the rows as members, the files that cannot be read, and signatures."""

import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.json_depth import parse_json
from loralens.errors import FormatError
from loralens.fleet.catalogue.members import Member, Signature, Unreadable
from loralens.fleet.catalogue.schema import index_command, open_to_read
from loralens.fleet.catalogue.slots import SlotHold, damaged_slots, read_slots
from loralens.fleet.catalogue.soundness import (
    are_modules,
    are_ranks,
    are_scales,
    are_sizes,
    are_texts,
    check_columns,
    check_values,
    decode_again,
    decode_list,
    is_name,
    is_size,
    is_slot,
    is_status,
    is_text,
    is_text_or_nothing,
    is_whole,
    leads_out,
)
from loralens.fleet.sketching.sketches import WIDTH, PickedRows, Sketches

_MEMBER = """select number, slot, name, path, real, bytes, format, base, inferred, signature, modules, zero_modules,
    extras, ranks, scales, parameters, frobenius, effective_rank, fingerprint, findings, added, stamp, checksum, step
    from files where status = 'adapter' order by name, number"""
# The kinds of these columns.
_KINDS = (
    is_whole, is_slot, is_name, is_name, is_name, is_whole, is_text, is_text_or_nothing, is_text_or_nothing, is_text,
    is_whole, is_whole, is_whole, are_ranks, are_scales, is_whole, is_size, is_size, is_text, are_texts, is_text,
    is_text, is_whole, is_size,
)  # fmt: skip
_FILE = "select path, name, real, stamp, status, bytes, reason, fix, added, slot, checksum from files"
_FILE_KINDS = (is_name, is_name, is_name, is_text, is_status, is_whole, is_text, is_text, is_text)
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
        return _commit(connection, home)


def _commit(connection: sqlite3.Connection, home: Path) -> int:
    row = connection.execute("select value from state where key = 'commit'").fetchone()
    try:
        return int(row[0]) if row else 0
    except ValueError as error:
        raise _damaged(home) from error


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
            commit = _commit(connection, home)
            root = read_root(connection, home) or home
            rows = connection.execute(_MEMBER).fetchall()
            unreadable = _read_unreadable(connection, root, home)
            settings = connection.execute("select value from state where key = 'reading'").fetchone()
        members = _sound_members(rows, root, home)
        slots = read_slots(home)
        # A copy cannot change after the check of its checksums.
        slots = slots if hold.is_held else np.array(slots)
        damaged = damaged_slots(slots, {row[1]: row[-2] for row in rows})
        if not damaged:
            stamps = {row[0]: row[-3] for row in rows}
            return FleetState(
                commit, root, members, unreadable, _sketches(slots, hold, rows), stamps, settings[0] if settings else ""
            )
        # A writer may have used a slot again that was freed after the rows were read.
        if commit == commit_number(home):
            break
    names = [row[2] for row in rows if row[1] in set(damaged)]
    # One damaged sketch is named, and of several the first.
    what = f"the sketch of {name_of(names[0])} is damaged"
    if len(names) > 1:
        what = f"{len(names)} sketches are damaged, such as that of {name_of(names[0])}"
    raise FormatError(
        f"{home}: {what}",
        fix=f"index again: {index_command(home, root)}",
    )


def check_catalogue(home: Path) -> None:
    """Refuse a catalogue that is damaged, or has rows that no update can have written; sketches are not looked at."""
    with open_to_read(home) as connection:
        sound = connection.execute("pragma quick_check").fetchone()[0] == "ok"
        rows = connection.execute(_MEMBER).fetchall()
        files = connection.execute(_FILE).fetchall()
        norms = connection.execute("select norms, modules, signature from files where status = 'adapter'").fetchall()
        signatures = dict(connection.execute("select signature, modules from signatures"))
        _commit(connection, home)
        root = read_root(connection, home) or home
    try:
        _check_members(rows)
        check_values([sound], [bool])
        check_columns([row[:-2] for row in files], _FILE_KINDS)
        check_columns([row[-2:] for row in files if row[-2] is not None], (is_slot, is_whole))
        _check_norms(norms, signatures)
    except ValueError as error:
        raise _damaged(home, root) from error


def _check_norms(rows: Iterable[tuple[Any, ...]], signatures: Mapping[object, object]) -> None:
    """Check that every adapter has a signature, and a norm for each module in it."""
    check_columns(list(signatures.items()), (is_text, are_modules))
    modules = {digest: len(decode_list(text)) for digest, text in signatures.items()}
    for norms, count, signature in rows:
        sizes = decode_list(norms)
        if not (are_sizes(sizes) and len(sizes) == count == modules.get(signature)):
            raise ValueError(f"{count} modules")


def read_summary(home: Path) -> CatalogueSummary:
    """What the catalogue holds; no sketch is looked at."""
    with open_to_read(home) as connection:
        root = read_root(connection, home) or home
        counted = dict(connection.execute("select status, count(*) from files group by status"))
        unreadable = _read_unreadable(connection, root, home)
        return CatalogueSummary(root, counted.get("adapter", 0), counted.get("other", 0), unreadable)


def _sketches(slots: NDArray[np.int8], hold: SlotHold, rows: list[tuple[Any, ...]]) -> Sketches:
    """The sketches in the order of the rows."""
    order = np.array([row[1] for row in rows], np.intp)
    steps = np.array([row[-1] for row in rows], np.float64)
    codes, starts = (PickedRows(slots, order, side, hold) for side in (slice(WIDTH), slice(WIDTH, None)))
    return Sketches(codes, steps, starts)


def _sound_members(rows: Sequence[tuple[Any, ...]], root: Path, home: Path) -> tuple[Member, ...]:
    """The members of rows; a row that no update can have written is refused, since an index may come from anywhere."""
    try:
        _check_members(rows)
        return tuple(_member(row, root) for row in rows)
    except ValueError as error:
        raise _damaged(home, root) from error


def _check_members(rows: Sequence[tuple[Any, ...]]) -> None:
    """Raise a ValueError if a row of a member is not such as an update writes it."""
    check_columns(rows, _KINDS)
    if any(leads_out(name_of(row[3])) for row in rows):
        raise ValueError("a path out of the folder")


def _damaged(home: Path, root: Path | None = None) -> FormatError:
    return FormatError(f"{home}: the catalogue is damaged", fix=f"index again: {index_command(home, root)}")


def _member(row: tuple[Any, ...], root: Path) -> Member:
    (number, slot, name, path, real, size, form, base, inferred, signature, modules, zero, extras, ranks, scales,
     parameters, norm, effective, fingerprint, findings, added, _, _, _) = row  # fmt: skip
    return Member(
        number, slot, name_of(name), root / name_of(path), name_of(real), size, form, base, inferred, signature,
        modules, zero, extras, decode_again(ranks), decode_again(scales), parameters, norm, effective, fingerprint,
        decode_again(findings), added,
    )  # fmt: skip


def read_others(home: Path, root: Path) -> tuple[Unreadable, ...]:
    """The files that hold tensors and no LoRA pairs, with the reason why they are not adapters."""
    with open_to_read(home) as connection:
        return _read_unreadable(connection, root, home, status="other")


def _read_unreadable(
    connection: sqlite3.Connection, root: Path, home: Path, *, status: str = "unreadable"
) -> tuple[Unreadable, ...]:
    rows = connection.execute(
        "select name, path, bytes, reason, fix from files where status = ? order by name, number", [status]
    ).fetchall()
    kinds = (is_name, is_name, is_whole, is_text, is_text)
    try:
        check_columns(rows, kinds)
    except ValueError as error:
        raise _damaged(home, root) from error
    return tuple(
        Unreadable(name_of(name), root / name_of(path), size, reason, fix) for name, path, size, reason, fix in rows
    )


def read_signature(home: Path, digest: str) -> Signature:
    """The names and shapes that a digest stands for."""
    with open_to_read(home) as connection:
        row = connection.execute("select modules from signatures where signature = ?", [digest]).fetchone()
    if row is None:
        raise FormatError(f"{home}: the signature {digest} is missing", fix=f"index again: {index_command(home)}")
    try:
        check_values(row, (are_modules,))
    except ValueError as error:
        raise _damaged(home) from error
    return to_signature(row[0])


def to_signature(text: str) -> Signature:
    """A signature as the catalogue stores it: a list of key, name and shape of every module."""
    modules = parse_json(text)
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
    try:
        sizes = decode_list(row[0])
        check_values((sizes,), (are_sizes,))
        return dict(zip(read_signature(home, member.signature).keys, sizes, strict=True))
    except ValueError as error:
        raise _damaged(home) from error


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
