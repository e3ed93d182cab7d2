"""Copies in a fleet: which adapters are the same update, and which files can be deleted without a loss."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.fleet.bases.architectures import bare_base_name
from loralens.fleet.catalogue.members import Member
from loralens.fleet.grouping.copies_result import CopiesResult, Copy, LinkedPath
from loralens.fleet.grouping.judging import Judge, near_pairs
from loralens.fleet.grouping.links import link_targets, paths_by_file
from loralens.formats.files.container import CONFIG
from loralens.formats.files.location import weights_among

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet


def find_copies(fleet: "Fleet") -> CopiesResult:
    """The adapters that are the same update as another one, and those that are nearly so.

    Equal fingerprints are copies. Of the others, those whose sketches have a cosine of at least 0.985 and whose norms
    are within 1 % are compared exactly. Of each group the file stays that others link to, else the one with the most
    bits for each number, else one that names its base, else the oldest. Paths to one file, through links or Hub caches,
    are one file.
    """
    members, sketches = fleet.snapshot()
    by_file = paths_by_file(members)
    files = sorted(rows[0] for rows in by_file)
    judge = Judge(fleet, members)
    first_of = _first_by_fingerprint(members, files)
    firsts = sorted(set(first_of.values()))
    proposed = list(near_pairs(sketches, np.array([members[row].frobenius for row in firsts]), np.array(firsts)))
    judge.compare_all(proposed)
    copies: list[Copy] = []
    close: list[Copy] = []
    groups = _groups_of_files(files, first_of, _linked_groups(firsts, judge.same_pairs()))
    alike = [members[row].path for rows in groups if len(rows) > 1 for row in rows]
    targets = link_targets(fleet.root, [*alike, *(path.parent / CONFIG for path in alike)])
    for rows in groups:
        copies += _copies_of_group(rows, members, judge, targets)
    copies = _with_files(copies, targets)
    replaced = {copy.member.number for copy in copies}
    for (first, second), sameness in sorted(judge.judged.items()):
        pair = members[first], members[second]
        if sameness.kind == "close" and not any(one.number in replaced for one in pair):
            close.append(Copy(*pair, sameness))
    judge.warn_of_failed()
    links = _further_paths(members, by_file)
    return CopiesResult(len(files), copies, close, links, fleet.command("copies", "--paths"))


def _further_paths(members: Sequence[Member], files: Sequence[Sequence[int]]) -> list[LinkedPath]:
    """The paths that lead to the file of another member."""
    links = [LinkedPath(members[row], members[own]) for own, *others in files for row in others]
    return sorted(links, key=lambda link: link.member.name)


def _first_by_fingerprint(members: Sequence[Member], rows: Sequence[int]) -> dict[int, int]:
    """Each row → the first row with its fingerprint."""
    first: dict[str, int] = {}
    return {row: first.setdefault(members[row].fingerprint, row) for row in rows}


def _groups_of_files(files: Sequence[int], first_of: Mapping[int, int], groups: Sequence[set[int]]) -> list[list[int]]:
    """The rows of each group: all files whose fingerprint is that of a row in it."""
    number = {row: i for i, group in enumerate(groups) for row in group}
    members: list[list[int]] = [[] for _ in groups]
    for row in files:
        members[number[first_of[row]]].append(row)
    return members


def _linked_groups(rows: Sequence[int], pairs: Sequence[tuple[int, int]]) -> list[set[int]]:
    """Sets of rows that pairs connect; a row without a pair is a set of its own."""
    group = {row: {row} for row in rows}
    for first, second in pairs:
        if group[first] is not group[second]:
            joined = group[first] | group[second]
            for row in joined:
                group[row] = joined
    return [group[row] for row in rows if row == min(group[row])]


def _copies_of_group(
    rows: Sequence[int], members: Sequence[Member], judge: Judge, targets: Mapping[Path, str]
) -> list[Copy]:
    """The copies among rows that may be the same: each is confirmed to be the same as the one that stays."""
    copies = []
    # If all files have the same numbers, wider ones hold nothing more, so their width does not decide which file stays.
    same = len({members[row].fingerprint for row in rows}) == 1
    waiting = list(rows)
    if len(rows) > 1:
        waiting.sort(key=lambda row: _reasons_to_keep(members[row], 0 if same else judge.width(row), targets))
    while len(waiting) > 1:
        kept, *others = waiting
        waiting = []
        for row in others:
            sameness = judge(kept, row)
            if sameness.is_copy:
                reason = targets.get(members[row].path) or _lost_base(members[kept], members[row])
                copies.append(Copy(members[kept], members[row], sameness, reason))
            else:
                # It is the same as a copy of the file that stays, but not as this file, because rounding has added up.
                waiting.append(row)
    return copies


def _reasons_to_keep(member: Member, width: int, targets: Mapping[Path, str]) -> tuple[Any, ...]:
    """A key that sorts the file first that should stay.

    It is the target of a link, has the widest numbers, names its base, or is the oldest.
    """
    try:
        written = member.path.stat().st_mtime_ns
    except OSError:
        written = 0
    return member.path not in targets, -width, not member.base, written, len(member.name), member.name


def _lost_base(kept: Member, member: Member) -> str:
    """Why the name of a base would be lost with a copy; empty if the kept adapter names the same one."""
    if not member.base or (kept.base and _is_same_base(kept.base, member.base)):
        return ""
    return f"names another base: {member.base}" if kept.base else f"only it names its base: {member.base}"


def _is_same_base(first: str, second: str) -> bool:
    """Whether two names mean one base: they are equal without organisation and folder, or one of them has none."""
    hub = [re.fullmatch(r"[\w.-]+/[\w.-]+", name) for name in (first, second)]
    # Two organisations may have different models of one name.
    return first == second or (bare_base_name(first) == bare_base_name(second) and not all(hub))


def _with_files(copies: Sequence[Copy], targets: Mapping[Path, str]) -> list[Copy]:
    """The copies with the files of those that can be deleted."""
    weights = {copy.member.path for copy in copies if copy.safe_to_delete}
    with_files = []
    for copy in copies:
        path, config = copy.member.path, copy.member.path.parent / CONFIG
        files = [path] if path in weights else []
        if files and config not in targets and _is_needed_only_by(weights, config):
            files.append(config)
        with_files.append(replace(copy, files=files, freed=copy.member.bytes + sum(map(_bytes, files[1:]))))
    return with_files


def _is_needed_only_by(weights: Collection[Path], config: Path) -> bool:
    """Whether there is a configuration, and all weights beside it are among these."""
    try:
        names = [path.name for path in config.parent.iterdir()]
    except OSError:  # nothing is listed of a folder that cannot be read
        return False
    return CONFIG in names and all(config.parent / name in weights for name in weights_among(names))


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
