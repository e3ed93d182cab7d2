"""Which adapters of a fleet are compressed together: the runs of the fleet, with the copies of their members."""

from collections import defaultdict
from typing import TYPE_CHECKING

from loralens.fleet.joint.code_group import FleetSource

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet


def fleet_groups(fleet: "Fleet") -> list[list[FleetSource]]:
    """The readable adapters of a fleet: one group for each run, and one for each adapter that is in none.

    Adapters of one run share the start of A, so their rows lie near a common space. Unrelated adapters do not, and
    bases for all of them would be larger than the adapters. A copy is in the group of its original.

    Raises
    ------
    FormatError
        A file has changed since it was indexed, or is gone.
    """
    copies_result = fleet.copies()
    originals = {copy.member.name: copy.kept.name for copy in copies_result.copies}
    # A link leads to the file of another member, so it is a copy too.
    originals |= {link.member.name: link.file.name for link in copies_result.links}
    run_of = {member.name: run.number for run in fleet.runs(sketch=True).runs for member in run.members}
    groups: dict[str | int, list[FleetSource]] = defaultdict(list)
    for member in fleet.members():
        fleet.check_unchanged(member)
        original = _first(originals, member.name)
        copy_of = "" if original == member.name else original
        source = FleetSource(member.name, str(member.path), **fleet.reading, copy_of=copy_of)
        groups[run_of.get(original, original)].append(source)
    return list(groups.values())


def _first(originals: dict[str, str], name: str) -> str:
    """The adapter of which the others are copies; a chain of copies is followed to its end."""
    seen = {name}
    while name in originals and originals[name] not in seen:
        name = originals[name]
        seen.add(name)
    return name
