"""The numbers of a report as one JSON object, without NaN."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.compare.interference import Interaction
from loralens.reporting.collection import CheckpointRun, Collection
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import json_number, matrix
from loralens.version import __version__


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
    best = subject.recommended
    chosen = subject.patient.adapter.without(
        [name for name in subject.patient.adapter if name not in subject.patient.readings]
    )
    return {
        "path": subject.path,
        "label": subject.label,
        "format": subject.patient.adapter.format,
        "base_model": subject.patient.adapter.base_model,
        "left_out": list(subject.sick),
        "modules": [
            {**report_record, **_base_measurements(subject, report_record["name"])}
            for report_record in tables.modules(subject).records()
        ],
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
            {"rank": p.rank, **{name: _choice(getattr(p, name)) for name in ("uniform", "budget")}}
            for p in subject.points
        ],
        "recommended_rank": best.rank if best and subject.norm else None,
        "plain_error": subject.plain,
    }


def _choice(choice: Any) -> dict[str, Any]:
    return {"ranks": list(choice.ranks), "parameters": choice.parameters, "bytes": choice.bytes, "error": choice.error}


def _base_measurements(subject: Subject, name: str) -> dict[str, Any]:
    """The measurements of a module against the base, as parts of its JSON object."""
    measured: dict[str, Any] = {}
    if subject.against_base and name in subject.against_base.amplified:
        amplified = subject.against_base.amplified[name]
        row = amplified.at_rank(amplified.s.size)  # at the full rank
        words = ("projected_norm", "random_norm", "amplification", "excess", "z")
        values = {word: json_number(getattr(row, word)) for word in words}
        measured["amplification"] = {**values, "weight_norm": amplified.weight_norm}
    if subject.against_base and subject.against_base.intruders and name in subject.against_base.intruders:
        new = subject.against_base.intruders[name]
        measured["intruders"] = {"count": new.count, "of": int(new.s.size), "scores": new.scores.tolist()}
        measured["intruders"] |= {"energy_share": new.energy_share, "chance": new.chance, "threshold": new.threshold}
    if name in subject.landings:
        landing = subject.landings[name]
        rounding = landing.rounding
        # The dtype is always that of the base, never an assumed one. The key stays because docs/json.md promises it.
        measured["merge"] = {"dtype": landing.dtype, "supposed": False, "ratio": json_number(landing.ratio)}
        measured["merge"] |= {
            "gain": json_number(rounding.gain),
            "error": json_number(rounding.error),
            "unmoved": json_number(rounding.unmoved),
        }
    return measured


def _collection_record(collection: Collection) -> dict[str, Any]:
    pairs, energy = collection.pairs, collection.energy
    return {
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
        "fights": [_meeting(meeting) for meeting in collection.fights],
        "agreements": [_meeting(meeting) for meeting in collection.agreements],
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


def _meeting(meeting: Interaction) -> dict[str, Any]:
    return {
        "first": meeting.first,
        "second": meeting.second,
        "where": meeting.location,
        "modules": meeting.modules,
        "cosine": meeting.cosine,
        "weight": meeting.weight,
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
                "effective_rank": point.effective_rank,
                "cosine": json_number(point.cosine),
                "previous_cosine": json_number(point.previous_cosine),
                "phi": {side: json_number(value) for side, value in point.phi.items()},
                "initial_cosine": json_number(point.initial),
            }
            for i, step, point in zip(run.order, run.steps, trajectory.points, strict=True)
        ],
        "losses": {name: [list(pair) for pair in logged] for name, logged in run.losses.items()},
    }
