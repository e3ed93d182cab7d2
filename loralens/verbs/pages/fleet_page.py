"""The page of a fleet: asks its index, and assembles the document."""

from collections.abc import Mapping, Sequence
from os import PathLike

import numpy as np

from loralens.analysis.every_pair import cluster_order
from loralens.fleet.groups import Family, exact_cosines
from loralens.fleet.sketches import Sketches
from loralens.reporting.document import Report
from loralens.reporting.fleet import FleetAnswers, FleetMap, fleet_report
from loralens.verbs.fleets.fleet_verbs import Fleet, open_fleet
from loralens.verbs.fleets.group_answers import FamiliesResult

MIN_ORDERED = 3  # families from which on their order can bring alike ones together
ROOM = 72  # adapters on the map: more would be rows of less than 9 pixels
# A pair of modules takes about 0.1 ms, so this takes some seconds.
MOST_PAIRS = 60_000  # pairs of modules up to which the cosines of the map are exact


def fleet_page(home: str | PathLike[str], *, command: str) -> Report:
    """The document about the fleet whose index is at ``home``; ``command`` as the page shows it."""
    fleet = open_fleet(home)
    families = fleet.families()
    answers = FleetAnswers(
        root=str(fleet.root),
        members=fleet.members(),
        unreadable=fleet.unreadable(),
        families=families,
        runs=fleet.runs(),
        copies=fleet.copies(),
        bases=fleet.bases(),
        map=_map_of(fleet, families),
    )
    return fleet_report(answers, command=command)


def _map_of(fleet: Fleet, families: FamiliesResult) -> FleetMap | None:
    """The map of the largest families; None if there is no family."""
    if not families.families:
        return None
    every, sketches = fleet.snapshot()
    row_of = {member.number: row for row, member in enumerate(every)}
    chosen = _side_by_side(families.families[:ROOM], row_of, sketches)
    most = _most_per_family(chosen)
    members = [member for family in chosen for member in family.members[:most]]
    sizes = [min(len(family.members), most) for family in chosen]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    pairs = sum(min(x.modules, y.modules) for i, x in enumerate(members) for y in members[:i])
    cosines = exact_cosines(fleet, members) if pairs <= MOST_PAIRS else None
    exact = cosines is not None
    if cosines is None:
        directions = sketches.directions(rows=[row_of[member.number] for member in members]).astype(np.float64)
        cosines = directions @ directions.T
    cut = most if any(len(family.members) > most for family in chosen) else 0
    return FleetMap([member.name for member in members], starts, cosines, exact, cut)


def _side_by_side(families: Sequence[Family], row_of: Mapping[int, int], sketches: Sketches) -> Sequence[Family]:
    """The families in an order in which those that are alike are side by side, by the sketches of their middles."""
    if len(families) < MIN_ORDERED:
        return families
    middles = sketches.directions(rows=[row_of[family.members[0].number] for family in families])
    order = cluster_order((middles @ middles.T).astype(np.float64))[1]
    return [families[i] for i in order]


def _most_per_family(families: Sequence[Family]) -> int:
    """The largest number of adapters of each family that have room on the map."""
    most = 1
    while sum(min(len(family.members), most + 1) for family in families) <= ROOM and any(
        len(family.members) > most for family in families
    ):
        most += 1
    return most
