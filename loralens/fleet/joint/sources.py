"""Which adapters of a fleet are compressed together: the runs of the fleet, with the copies of their members."""

from collections import defaultdict
from typing import TYPE_CHECKING

from loralens.fleet.joint.code_group import FleetSource

if TYPE_CHECKING:
    from loralens.fleet.catalogue.members import Member
    from loralens.fleet.fleet import Fleet

# The factors of a group are in memory in float64 at the same time, three times at the worst. Of adapters of rank 8 for
# q and v of a model of 7 billion parameters, 25 are in a group.
MOST_PARAMETERS = 100_000_000


def fleet_groups(fleet: "Fleet") -> list[list[FleetSource]]:
    """The readable adapters of a fleet: one group or more for each run, and one for each adapter that is in none.

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
    reading = fleet.reading
    run_of = {member.name: run.number for run in fleet.runs(sketch=True).runs for member in run.members}
    groups: dict[str | int, list[tuple[Member, FleetSource]]] = defaultdict(list)
    for member in fleet.members():
        fleet.check_unchanged(member)
        original = _first(originals, member.name)
        copy_of = "" if original == member.name else original
        source = FleetSource(member.name, str(member.path), **reading, copy_of=copy_of)
        groups[run_of.get(original, original)].append((member, source))
    return [part for group in groups.values() for part in _divide(group)]


def _divide(group: "list[tuple[Member, FleetSource]]") -> list[list[FleetSource]]:
    """A group in parts that fit into memory, as equal as possible; copies stay with their originals."""
    own = [(member.parameters, source) for member, source in group if not source.copy_of]
    parts = min(len(own), -(-sum(parameters for parameters, _ in own) // MOST_PARAMETERS)) or 1
    size = -(-len(own) // parts)
    part_of = {source.name: i // size for i, (_, source) in enumerate(own)}
    divided: dict[int, list[FleetSource]] = defaultdict(list)
    for _, source in group:
        divided[part_of.get(source.copy_of or source.name, 0)].append(source)
    return list(divided.values())


def _first(originals: dict[str, str], name: str) -> str:
    """The adapter of which the others are copies; a chain of copies is followed to its end."""
    chain = {name}
    while name in originals and originals[name] not in chain:
        name = originals[name]
        chain.add(name)
    return name
