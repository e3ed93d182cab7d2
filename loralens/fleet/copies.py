"""Copies in a fleet: which adapters are the same update, and which files can be deleted without a loss."""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np

from loralens.core.fingerprint import fingerprint
from loralens.core.messages import progress
from loralens.core.threads import in_threads, processor_count
from loralens.errors import LoraLensError
from loralens.fleet.catalogue import Member
from loralens.fleet.fleet_index import ChangedFile, FleetIndex
from loralens.fleet.groups import near_pairs, paths_by_file, rows_by_label
from loralens.fleet.known_bases import bare_base_name
from loralens.fleet.likeness import TENSORS, Sameness, judge_sameness, known_steps
from loralens.formats.files.container import CONFIG
from loralens.formats.files.location import weights_among
from loralens.formats.files.outside import folders
from loralens.linalg.pairwise import join_pairs


@final
@dataclass(frozen=True, slots=True)
class Copy:
    """One adapter that is the same as another, or nearly.

    Attributes
    ----------
    kept : Member
        The adapter that stays.
    member : Member
        The other one.
    sameness : Sameness
    protected : str
        Why it must not be deleted although it is a copy; empty if it can be.
    files : sequence of Path
        What can be deleted: its weights, and its configuration if no other weights in the folder need it.
    freed : int
        The bytes of these files.
    """

    kept: Member
    member: Member
    sameness: Sameness
    protected: str = ""
    files: Sequence[Path] = ()
    freed: int = 0

    @property
    def safe_to_delete(self) -> bool:
        """Whether the files of this copy can be deleted without a loss."""
        return self.sameness.is_copy and not self.protected


@final
@dataclass(frozen=True, slots=True)
class LinkedPath:
    """A path that leads to the file of a member through a link, and is therefore not a copy."""

    member: Member
    file: Member


def find_copies(index: FleetIndex) -> tuple[int, list[Copy], list[Copy], list[LinkedPath]]:
    """The number of files, the copies among them, what is nearly the same, and further paths to one file.

    Equal fingerprints are copies. Of the others, those whose sketches have a cosine of at least 0.985 and whose norms
    are within 1 % are compared exactly. Of each group the file stays that others link to, else the one with the most
    bits for each number, else one that names its base, else the oldest. Paths to one file, through links or Hub caches,
    are one file.
    """
    members, sketches = index.snapshot()
    by_file = paths_by_file(members)
    files = sorted(rows[0] for rows in by_file)
    first: dict[str, int] = {}
    pairs = [(first.setdefault(members[row].fingerprint, row), row) for row in files]
    firsts = np.array(sorted(first.values()))
    norms = np.array([member.frobenius for member in members])
    judge = Judge(index, members)
    pairs += judge.same_pairs(list(near_pairs(sketches, norms[firsts], firsts)) if files else [])
    labels = np.arange(len(members))
    join_pairs(labels, *np.array(pairs, dtype=np.int64).reshape(-1, 2).T)
    groups = [rows.tolist() for rows in rows_by_label(labels) if len(rows) > 1]
    alike = [members[row].path for rows in groups for row in rows]
    targets = link_targets(index.root, [*alike, *(path.parent / CONFIG for path in alike)])
    copies = _with_files([copy for rows in groups for copy in _copies_of_group(rows, judge, targets)], targets)
    replaced = {copy.member.number for copy in copies}
    close = [
        Copy(members[one], members[other], sameness)
        for (one, other), sameness in sorted(judge.judged.items())
        if sameness.kind == "close" and replaced.isdisjoint((members[one].number, members[other].number))
    ]
    index.warn_of_changed(sorted(judge.changed), "not compared")
    links = [LinkedPath(members[row], members[own]) for own, *others in by_file for row in others]
    return len(files), copies, close, sorted(links, key=lambda link: link.member.name)


def _copies_of_group(rows: Sequence[int], judge: "Judge", targets: Mapping[Path, str]) -> list[Copy]:
    """The copies among rows that may be the same: each is confirmed to be the same as the one that stays."""
    copies, members = [], judge.members
    # If all files have the same numbers, wider ones hold nothing more, so their width does not decide which file stays.
    same = len({members[row].fingerprint for row in rows}) == 1
    waiting = sorted(rows, key=lambda row: _reasons_to_keep(members[row], 0 if same else judge.width(row), targets))
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


def link_targets(root: Path, paths: Sequence[Path]) -> Mapping[Path, str]:
    """The paths that must stay because of links, each with the reason in words.

    A path stays if a link under ``root`` leads to it or to a folder above it, and if it is a link itself, because its
    deletion would free nothing. A link to ``root`` itself or to a folder above it says nothing about single adapters.
    Links elsewhere on the machine cannot be known.
    """
    targets: dict[str, str] = {}
    home = Path(os.path.realpath(root))
    for folder, files in folders(root, without=lambda _: False):
        for name in files:
            link = folder / name
            # A link that may not be followed leads to no file that this user could delete.
            with suppress(OSError):
                if link.is_symlink() and not home.is_relative_to(target := os.path.realpath(link)):
                    targets.setdefault(target, str(link.relative_to(root)))
    reasons = {}
    for path in paths:
        # A link may lead to the file or to a folder above it.
        real = os.path.realpath(path)
        while real not in targets and real != os.path.dirname(real):  # noqa: PTH120
            real = os.path.dirname(real)  # noqa: PTH120
        if real in targets:
            own = os.path.relpath(path, root)
            reasons[path] = "is a link" if targets[real] == own else f"{targets[real]} links to it"
    return reasons


@final
class Judge:
    """Compares pairs of members exactly, each once.

    Attributes
    ----------
    judged : dict of (int, int) to Sameness
        Pairs of rows that were compared.
    changed : set of str
        The names of members whose files have changed since they were indexed.
    """

    def __init__(self, index: FleetIndex, members: Sequence[Member]) -> None:
        self.index, self.members = index, members
        self._by_fingerprint: dict[str, list[Member]] = {}
        for member in members:
            self._by_fingerprint.setdefault(member.fingerprint, []).append(member)
        self.judged: dict[tuple[int, int], Sameness] = {}
        self.changed: set[str] = set()

    def __call__(self, first: int, second: int) -> Sameness:
        """How much two rows are the same; a file that cannot be read any more is the same as nothing."""
        pair = min(first, second), max(first, second)
        if pair not in self.judged:
            self.judged[pair] = self._compare([self.members[row] for row in pair])
        return self.judged[pair]

    def same_pairs(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """The copies among pairs; in threads, as most of the time goes into reading and small products."""
        with progress("comparing", len(pairs)) as step:
            compared = in_threads(lambda pair: self(*pair), pairs, processor_count(), step)
        return [pair for pair, sameness in compared.items() if sameness.is_copy]

    def width(self, row: int) -> int:
        """The bytes of each number of an adapter; 0 if its file cannot be read any more."""
        try:
            modules = self.index.adapter(self.members[row]).modules.values()
        except LoraLensError:  # it has changed, and may be anything now
            return 0
        return min((module.dtype.itemsize for module in modules), default=0)

    def _compare(self, members: Sequence[Member]) -> Sameness:
        # Files with equal fingerprints are read too: users delete copies, and a file may have been removed or replaced
        # since it was indexed.
        same_numbers = members[0].fingerprint == members[1].fingerprint
        adapters = []
        for member in members:
            try:
                adapters.append(self.index.adapter(member))
                if same_numbers and fingerprint(adapters[-1]) != member.fingerprint:
                    raise ChangedFile(member.name)
            except (LoraLensError, ChangedFile):  # it has changed, and may be anything now
                self.changed.add(member.name)
                return Sameness("", 0.0, float("inf"))
        if same_numbers:
            return TENSORS
        steps = [known_steps(self._by_fingerprint[member.fingerprint]) for member in members]
        return judge_sameness(*adapters, steps=steps)
