"""The numbers of a report as one JSON object, without NaN."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

from loralens.analysis.diagnosis import Diagnosis
from loralens.analysis.interference import Interaction
from loralens.compression.plan import Choice
from loralens.reporting.collection import CheckpointRun, Collection
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import json_number, matrix
from loralens.version import __version__


@final
class DeferredRecord(Mapping[str, Any]):
    """A record that is made when it is first read: a page needs none, and that of many modules is large."""

    __slots__ = ("_content", "_make")

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make
        self._content: Mapping[str, Any] | None = None

    def _made(self) -> Mapping[str, Any]:
        if self._content is None:
            self._content = self._make()
        return self._content

    def __getitem__(self, key: str) -> Any:
        return self._made()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())


def report_record(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    collection: Collection | None,
    run: CheckpointRun | None,
    summary: Sequence[str],
    tables: ResultTables,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """The report as a JSON object; a missing value is None."""
    return {
        "loralens": __version__,
        **choices,
        "summary": list(summary),
        "findings": [finding.record() for finding in findings],
        "adapters": [_adapter(subject, tables) for subject in subjects],
        "together": _collection_record(collection) if collection else None,
        "run": _run_record(subjects, run) if run else None,
    }


def _adapter(subject: Subject, tables: ResultTables) -> dict[str, Any]:
    best, adapter = subject.recommended, subject.examination.adapter
    # The totals cover the requested modules, including those that are left out below.
    chosen = adapter.without([name for name in adapter if name not in subject.examination.readings])
    return {
        "path": subject.path,
        "label": subject.label,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "left_out": list(subject.non_finite),
        "modules": [{**row, **_base_measurements(subject, row["name"])} for row in tables.modules(subject).records()],
        "total": {
            "modules": len(chosen),
            "parameters": chosen.parameters,
            "bytes": chosen.nbytes,
            "frobenius": subject.norm if subject.spectra else None,
        },
        "written_as": subject.dialect.name,
        "error_on_data": subject.on_data,
        "activations": subject.activations or None,
        "curve": [
            {"rank": point.rank, "uniform": _choice(point.uniform), "budget": _choice(point.budget)}
            for point in subject.points
        ],
        # Where every ΔW is 0, rank 1 loses nothing, and recommending it would say nothing.
        "recommended_rank": best.rank if best and subject.norm else None,
        "plain_error": subject.update_error,
    }


def _choice(choice: Choice) -> dict[str, Any]:
    return {"ranks": list(choice.ranks), "parameters": choice.parameters, "bytes": choice.bytes, "error": choice.error}


def _numbers(value: object, *names: str) -> dict[str, float | None]:
    """Some attributes of a value, by their names."""
    return {name: json_number(getattr(value, name)) for name in names}


def _base_measurements(subject: Subject, name: str) -> dict[str, Any]:
    """The measurements of a module against the base, as parts of its JSON object."""
    record: dict[str, Any] = {}
    if amplified := subject.against_base.amplified.get(name):
        row = amplified.at_rank(amplified.s.size)  # at the full rank
        numbers = _numbers(row, "projected_norm", "random_norm", "amplification", "excess", "z")
        record["amplification"] = {**numbers, "weight_norm": amplified.weight_norm}
    if new := subject.against_base.intruders.get(name):
        record["intruders"] = {"count": new.count, "of": int(new.s.size), "scores": new.scores.tolist()}
        record["intruders"] |= _numbers(new, "energy_share", "chance", "threshold")
    if effect := subject.merge_effects.get(name):
        # The dtype is always that of the base, never an assumed one. The key stays because docs/json.md promises it.
        record["merge"] = {"dtype": effect.dtype, "supposed": False, **_numbers(effect, "ratio")}
        record["merge"] |= _numbers(effect.rounding, "gain", "error", "unmoved")
    return record


def _collection_record(collection: Collection) -> dict[str, Any]:
    pairs, energy = collection.pairs, collection.energy
    return {
        # Rows and columns in the order in which the adapters were given; "order" is that of the matrices on the page.
        "cosine": matrix(pairs.cosine),
        "cosine_z": matrix(pairs.cosine_z),
        "phi": {side: matrix(pairs.phi(side)) for side in pairs.overlaps},
        "chance": {side: matrix(pairs.chance(side)) for side in pairs.overlaps},
        "shared_initialisation": matrix(pairs.shared_initialisation),
        "families": [list(group) for group in collection.families],
        "order": list(collection.order),
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "cosine": matrix(pairs.cosines[m]),
                "shared": [json_number(value) for value in energy.shared[m]],
                "shared_chance": [json_number(value) for value in energy.shared_chance[m]],
            }
            for m, module in enumerate(pairs.modules)
        ],
        # The JSON has the key "fights", although the program calls these modules conflicts.
        "fights": [_interaction(conflict) for conflict in collection.conflicts],
        "agreements": [_interaction(agreement) for agreement in collection.agreements],
        "phi_maps": [
            {
                "first": s,
                "second": t,
                "modules": [
                    {"name": name, **{side: overlap.phi.tolist() for side, overlap in comparison.overlaps.items()}}
                    for name, comparison in compared.items()
                ],
            }
            for (s, t), compared in collection.compared.items()
        ],
    }


def _interaction(place: Interaction) -> dict[str, Any]:
    adapters = {"first": place.first, "second": place.second}
    return {
        **adapters,
        "where": place.location,
        "modules": place.modules,
        "cosine": place.cosine,
        "weight": place.weight,
    }


def _run_record(subjects: Sequence[Subject], run: CheckpointRun) -> dict[str, Any]:
    trajectory = run.trajectory
    return {
        "settled": None if trajectory.settled is None else run.steps[trajectory.settled],
        "chance": {side: json_number(value) for side, value in trajectory.chance.items()},
        "checkpoints": [
            {
                "path": subjects[i].path,
                "step": step,
                "frobenius": point.frobenius,
                "step_length": json_number(point.length),
                **_numbers(point, "effective_rank", "cosine", "previous_cosine"),
                "phi": {side: json_number(value) for side, value in point.phi.items()},
                "initial_cosine": json_number(point.initial),
            }
            for i, step, point in zip(run.order, run.steps, trajectory.points, strict=True)
        ],
        "losses": {name: [list(pair) for pair in logged] for name, logged in run.losses.items()},
    }
