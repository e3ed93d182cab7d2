"""Reading the catalogue: the rows as members, the files that cannot be read, and signatures."""

import errno
import os
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.stored import parse_json
from loralens.errors import FormatError
from loralens.fleet.catalogue.members import Member, Signature, Unreadable
from loralens.fleet.catalogue.schema import check_files, damaged, index_command, open_to_read, read_rows
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
    is_base_or_nothing,
    is_name,
    is_size,
    is_slot,
    is_status,
    is_text,
    is_whole,
    leads_out,
)
from loralens.fleet.sketching.sketches import WIDTH, PickedRows, Sketches

_MEMBER = """select number, slot, name, path, real, bytes, format, base, inferred, signature, modules, zero_modules,
    extras, ranks, scales, parameters, frobenius, effective_rank, fingerprint, findings, added, stamp, checksum, step
    from files where status = 'adapter'"""
# The kinds of these columns.
_KINDS = (
    is_whole, is_slot, is_name, is_name, is_name, is_whole, is_text, is_base_or_nothing, is_base_or_nothing, is_text,
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
    try:
        return int(read_setting(connection, home, "commit") or 0)
    except ValueError as error:
        raise damaged(home) from error


def read_setting(connection: sqlite3.Connection, home: Path, key: str) -> str | None:
    """A value that an update has stored as text; None if it has not."""
    row = connection.execute("select value from state where key = ?", [key]).fetchone()
    if row and not is_text(row[0]):
        raise damaged(home)
    return row[0] if row else None


def read_root(connection: sqlite3.Connection, home: Path) -> Path | None:
    """The folder of the adapters; None in a new index."""
    row = connection.execute("select value from state where key = 'root'").fetchone()
    if row is None:
        return None
    if not is_name(row[0]):
        raise damaged(home)
    # A root that contains the index is stored relative to it, so that both can be moved together.
    root = Path(os.path.normpath(home / name_of(row[0])))
    # An index from elsewhere could otherwise have the whole disk looked through.
    if is_whole_disk(root) or _is_too_long(root):
        raise damaged(home)
    return root


def _is_too_long(path: Path) -> bool:
    """Whether no file can have this path, which the methods of a Path answer by an error."""
    try:
        path.lstat()
    except OSError as error:
        return error.errno == errno.ENAMETOOLONG
    return False


def is_whole_disk(folder: Path) -> bool:
    """Whether a folder, or the target of a link, is that at the top of all others."""
    return os.path.realpath(folder) == os.sep


def read_state(home: Path) -> FleetState:
    """The last committed state.

    Raises
    ------
    FormatError
        A sketch is damaged.
    """
    torn: list[int] = []
    for _ in range(TRIES):
        check_files(home)
        hold = SlotHold(home)
        with open_to_read(home) as connection:
            commit = _commit(connection, home)
            root = read_root(connection, home) or home
            rows = list(read_rows(connection, home, _MEMBER))
            unreadable = _read_unreadable(connection, root, home)
            settings = read_setting(connection, home, "reading") or ""
        members = _sound_members(rows, root, home)
        slots = read_slots(home)
        # A copy cannot change after the check of its checksums.
        slots = slots if hold.is_held else np.array(slots)
        torn = damaged_slots(slots, {row[1]: row[-2] for row in rows})
        if not torn:
            stamps = {row[0]: row[-3] for row in rows}
            return FleetState(commit, root, members, unreadable, _sketches(slots, hold, rows), stamps, settings)
        # A writer may have used a slot again that was freed after the rows were read.
        if commit == commit_number(home):
            break
    names = [row[2] for row in rows if row[1] in set(torn)]
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
        rows = list(read_rows(connection, home, _MEMBER))
        files = list(read_rows(connection, home, _FILE))
        measured = "select norms, modules, signature from files where status = 'adapter'"
        norms = list(read_rows(connection, home, measured))
        signatures = dict(read_rows(connection, home, "select signature, modules from signatures"))
        _commit(connection, home)
        read_setting(connection, home, "reading")
        root = read_root(connection, home) or home
    try:
        _check_members(rows)
        check_values([sound], [bool])
        check_columns([row[:-2] for row in files], _FILE_KINDS)
        check_columns([row[-2:] for row in files if row[-2] is not None], (is_slot, is_whole))
        _check_norms(norms, signatures)
    except ValueError as error:
        raise damaged(home, root) from error


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
        counted = Counter(status for (status,) in read_rows(connection, home, "select status from files"))
        unreadable = _read_unreadable(connection, root, home)
        return CatalogueSummary(root, counted["adapter"], counted["other"], unreadable)


def _sketches(slots: NDArray[np.int8], hold: SlotHold, rows: list[tuple[Any, ...]]) -> Sketches:
    """The sketches in the order of the rows."""
    order = np.array([row[1] for row in rows], np.intp)
    steps = np.array([row[-1] for row in rows], np.float64)
    codes, starts = (PickedRows(slots, order, side, hold) for side in (slice(WIDTH), slice(WIDTH, None)))
    return Sketches(codes, steps, starts)


def _sound_members(rows: list[tuple[Any, ...]], root: Path, home: Path) -> tuple[Member, ...]:
    """The members of rows, which are sorted; a row that no update can have written is refused."""
    try:
        _check_members(rows)
    except ValueError as error:
        raise damaged(home, root) from error
    # Not sorted by SQLite, which would write what hostile pages repeat without end to a file before the first row.
    rows.sort(key=lambda row: (*_text_first(row[2]), row[0]))
    return tuple(_member(row, root) for row in rows)


def _text_first(name: str | bytes) -> tuple[bool, str | bytes]:
    """The key by which SQLite sorts names: those that are text come before those that are bytes."""
    return isinstance(name, bytes), name


def _check_members(rows: Sequence[tuple[Any, ...]]) -> None:
    """Raise a ValueError if a row of a member is not such as an update writes it."""
    check_columns(rows, _KINDS)
    if any(leads_out(name_of(row[3])) for row in rows):
        raise ValueError("a path out of the folder")


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
    query = "select name, path, bytes, reason, fix, number from files where status = ?"
    rows = list(read_rows(connection, home, query, [status]))
    kinds = (is_name, is_name, is_whole, is_text, is_text, is_whole)
    try:
        check_columns(rows, kinds)
    except ValueError as error:
        raise damaged(home, root) from error
    rows.sort(key=lambda row: (*_text_first(row[0]), row[-1]))
    return tuple(
        Unreadable(name_of(name), root / name_of(path), size, reason, fix) for name, path, size, reason, fix, _ in rows
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
        raise damaged(home) from error
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
        return {name_of(path): stamp for path, stamp in read_rows(connection, home, "select path, stamp from files")}


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
        raise damaged(home) from error


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
