"""Modules that contain the same numbers as another module."""

from collections.abc import Iterator, Mapping

from loralens.analysis.checks.diagnosis import Diagnosis, share
from loralens.analysis.checks.examination import Examination
from loralens.core.names import some

CODES = {
    "module-copied": "A module has the same B and the same A as another one: one was written over the other.",
    "factor-copied": "A module has the B or the A of another one, although the others have their own.",
    "factor-shared": "Many modules share one B or one A. That is a design (VeRA, a frozen or tied A, the parts of a "
    "fused projection), or every module was started from one seed.",
}
MINORITY = 0.5  # if a larger share of the modules has copies, sharing is the design of the method
GROUPS = 2  # more groups of equal factors are a design too, such as q, k and v of every block with one A


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every copy that is an exception as a warning, and sharing that is the rule as a note.

    Modules with ΔW = 0 are left out: untrained copies of B = 0 are equal everywhere.
    """
    # Hashes instead of numbers, so that nothing is read again and each module is looked up once.
    pairs = {name: (what.B.digest, what.A.digest) for name, what in exam.pairs.items() if what.B and what.A}
    shared_pairs = _groups(pairs)
    copies = {name: first for first, *copies_of_it in shared_pairs for name in copies_of_it}
    if len(copies) <= MINORITY * len(pairs):
        fix = "save the module again from its training, or leave it out: what it had learned is not in the file"
        for name, first in copies.items():
            evidence = f"its B and A are those of {first}, number for number"
            yield Diagnosis("warning", "module-copied", evidence, fix, name)
    else:
        count = len(copies) + len(shared_pairs)
        evidence = f"{share(count, len(pairs))} share their B and A with another: {some(shared_pairs[0])}"
        yield Diagnosis("note", "factor-shared", evidence)
        return
    for i, factor in enumerate("BA"):
        # A copied module has both factors of another one, and was reported above.
        groups = _groups({name: digests[i] for name, digests in pairs.items() if name not in copies})
        members = sum(map(len, groups))
        if len(groups) > GROUPS or members > MINORITY * len(pairs):
            what = f"one {factor}" if len(groups) == 1 else f"{len(groups)} {factor}"
            evidence = f"{share(members, len(pairs))} have {what} between them: {some(groups[0])}"
            yield Diagnosis("note", "factor-shared", evidence)
            continue
        for first, *copies_of_it in groups:
            for name in copies_of_it:
                evidence = f"its {factor} is that of {first}, number for number"
                yield Diagnosis("warning", "factor-copied", evidence, "save the module again from its training", name)


def _groups(digests: Mapping[str, object]) -> list[list[str]]:
    """Groups of two or more names with the same digest."""
    members: dict[object, list[str]] = {}
    for name, digest in digests.items():
        members.setdefault(digest, []).append(name)
    return [names for names in members.values() if len(names) > 1]
