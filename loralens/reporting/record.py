"""The numbers of a report for machines: one JSON object, without NaN."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.compare.interference import Interaction
from loralens.reporting.company import Company, Course
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import known, matrix
from loralens.version import __version__


def record(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    company: Company | None,
    course: Course | None,
    summary: Sequence[str],
    tables: ResultTables,
    choices: Mapping[str, Any],
) -> dict[str, Any]:
    """The whole report; what has no value is None."""
    return {
        "loralens": __version__,
        **choices,
        "summary": list(summary),
        "findings": [one.record() for one in findings],
        "adapters": [_adapter(one, tables) for one in subjects],
        "together": _company(company) if company else None,
        "run": _course(subjects, course) if course else None,
    }


def _adapter(one: Subject, tables: ResultTables) -> dict[str, Any]:
    best = one.recommended
    chosen = one.patient.adapter.without([name for name in one.patient.adapter if name not in one.patient.readings])
    return {
        "path": one.path,
        "label": one.label,
        "format": one.patient.adapter.format,
        "base_model": one.patient.adapter.base_model,
        "left_out": list(one.sick),
        "modules": [{**record, **_against(one, record["name"])} for record in tables.modules(one).records()],
        "total": {
            "modules": len(chosen),
            "parameters": chosen.parameters,
            "bytes": chosen.nbytes,
            "frobenius": one.norm if one.spectra else None,
        },
        "written_as": one.dialect.name,
        "error_on_data": one.on_data,
        "activations": one.activations or None,
        "curve": [
            {"rank": p.rank, **{name: _choice(getattr(p, name)) for name in ("uniform", "budget")}} for p in one.points
        ],
        "recommended_rank": best.rank if best and one.norm else None,
        "plain_error": one.plain,
    }


def _choice(one: Any) -> dict[str, Any]:
    return {"ranks": list(one.ranks), "parameters": one.parameters, "bytes": one.bytes, "error": one.error}


def _against(one: Subject, name: str) -> dict[str, Any]:
    """What the base makes of a module."""
    found: dict[str, Any] = {}
    if one.beside and name in one.beside.amplified:
        amplified = one.beside.amplified[name]
        row = amplified.at_rank(amplified.s.size)
        words = ("projected_norm", "random_norm", "amplification", "excess", "z")
        values = {word: known(getattr(row, word)) for word in words}
        found["amplification"] = {**values, "weight_norm": amplified.weight_norm}
    if one.beside and one.beside.intruders and name in one.beside.intruders:
        new = one.beside.intruders[name]
        found["intruders"] = {"count": new.count, "of": int(new.s.size), "scores": new.scores.tolist()}
        found["intruders"] |= {"energy_share": new.energy_share, "chance": new.chance, "threshold": new.threshold}
    if name in one.landings:
        landing = one.landings[name]
        told = landing.rounding
        # The dtype is that of the base, and never a supposed one; the key stays, as docs/json.md promises of all.
        found["merge"] = {"dtype": landing.dtype, "supposed": False, "ratio": known(landing.ratio)}
        found["merge"] |= {"gain": known(told.gain), "error": known(told.error), "unmoved": known(told.unmoved)}
    return found


def _company(found: Company) -> dict[str, Any]:
    pairs, energy = found.pairs, found.energy
    return {
        "cosine": matrix(pairs.cosine),
        "cosine_z": matrix(pairs.cosine_z),
        "phi": {side: matrix(pairs.phi(side)) for side in pairs.overlaps},
        "chance": {side: matrix(pairs.chance(side)) for side in pairs.overlaps},
        "shared_initialisation": matrix(pairs.shared_initialisation),
        "families": [list(group) for group in found.families],
        "order": list(found.order),
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "cosine": matrix(pairs.cosines[m]),
                "shared": [known(value) for value in energy.shared[m]],
                "shared_chance": [known(value) for value in energy.shared_chance[m]],
            }
            for m, module in enumerate(pairs.modules)
        ],
        "fights": [_meeting(one) for one in found.fights],
        "agreements": [_meeting(one) for one in found.agreements],
        "phi_maps": [
            {
                "first": s,
                "second": t,
                "modules": [
                    {"name": name, **{side: overlap.phi.tolist() for side, overlap in one.overlaps.items()}}
                    for name, one in compared.items()
                ],
            }
            for (s, t), compared in found.compared.items()
        ],
    }


def _meeting(one: Interaction) -> dict[str, Any]:
    return {
        "first": one.first,
        "second": one.second,
        "where": one.where,
        "modules": one.modules,
        "cosine": one.cosine,
        "weight": one.weight,
    }


def _course(subjects: Sequence[Subject], course: Course) -> dict[str, Any]:
    found = course.found
    return {
        "settled": None if found.settled is None else course.steps[found.settled],
        "chance": {side: known(value) for side, value in found.chance.items()},
        "checkpoints": [
            {
                "path": subjects[i].path,
                "step": step,
                "frobenius": point.frobenius,
                "step_length": known(point.length),
                "effective_rank": point.effective_rank,
                "cosine": known(point.cosine),
                "previous_cosine": known(point.previous_cosine),
                "phi": {side: known(value) for side, value in point.phi.items()},
                "initial_cosine": known(point.initial),
            }
            for i, step, point in zip(course.order, course.steps, found.points, strict=True)
        ],
        "losses": {name: [list(pair) for pair in logged] for name, logged in course.losses.items()},
    }
