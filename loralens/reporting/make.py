"""Assembles a report from measurements: its sections, in the order in which they are read, and its record for JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from loralens.analysis.diagnosis import Diagnosis
from loralens.analysis.interacting_pairs import Interaction
from loralens.formats.records.results import StoredEvaluation
from loralens.reporting.adapter_sections import (
    base_section,
    facts_section,
    findings_section,
    learned_section,
    modules_section,
    quality_section,
    ranks_section,
    spectra_section,
)
from loralens.reporting.comparison_sections import comparison_section, run_section
from loralens.reporting.document import Report
from loralens.reporting.sentences import (
    answers_of,
    headline,
    quality_sentence,
    remarks,
    summary_of,
    verdict_of,
    verdicts_table,
)
from loralens.reporting.subject import CheckpointRun, Collection, Subject
from loralens.tables.numbers import count, join_words, json_number
from loralens.tables.table import Table, plain
from loralens.version import __version__


def make_report(
    subjects: Sequence[Subject],
    findings: Sequence[Diagnosis],
    *,
    collection: Collection | None = None,
    run: CheckpointRun | None = None,
    base: str | None = None,
    evaluations: Sequence[tuple[StoredEvaluation, Table[Any]]] = (),
    command: str = "",
    choices: Mapping[str, Any] | None = None,
) -> Report:
    """The report of one adapter or several.

    Parameters
    ----------
    subjects : sequence of Subject
        One or more, with labels that differ.
    findings : sequence of Diagnosis
        The findings of all adapters, most serious first.
    collection : Collection, optional
        The comparison of two or more adapters; None if no two of them have a module in common.
    run : CheckpointRun, optional
        Given if the adapters are checkpoints of one run.
    base : str, optional
        The base against which the adapters were measured.
    evaluations : sequence of (StoredEvaluation, Table)
        What was measured on texts, under the names of the page, and as a table.
    command : str
        The command that makes the report.
    choices : mapping, optional
        The choices of the user, which the JSON repeats.
    """
    labels = [subject.label for subject in subjects]
    quality = [quality_sentence(evaluation) for evaluation, _ in evaluations]
    verdicts = [verdict_of(subject, findings) for subject in subjects]
    table = verdicts_table(verdicts)
    answers = answers_of(verdicts, findings, collection, run, base)
    answer, *further_answers = [*quality, headline(verdicts, collection, run)]
    return Report(
        # Four names and more would not fit on the tab of a browser.
        title=join_words(labels) if len(labels) < 4 else f"{labels[0]} and {count(len(labels) - 1, 'other adapter')}",
        command=command,
        headline=answer,
        answers=answers,
        verdicts=table,
        # The tables of several adapters compare them: a paragraph for each would repeat the same words.
        remarks=[*further_answers, *(remarks(subjects[0]) if len(subjects) == 1 else [])],
        sections=[
            # What was measured on texts is what readers want to know first. The findings and the facts follow, as all
            # numbers below depend on them. The longest table comes last.
            *([quality_section([table for _, table in evaluations])] if evaluations else []),
            findings_section(subjects, findings, base),
            facts_section(subjects),
            *([run_section(run)] if run else []),
            *([learned_section(subjects)] if any(subject.learned for subject in subjects) else []),
            spectra_section(subjects),
            ranks_section(subjects),
            *([base_section(subjects, base)] if base else []),
            # Several adapters get this section even if they have nothing in common, which it then says.
            *([comparison_section(subjects, collection)] if len(subjects) > 1 else []),
            modules_section(subjects),
        ],
        record={
            "loralens": __version__,
            "base": base,
            "command": command,
            **(choices or {}),
            "headline": answer,
            "answers": [{"question": question, "answer": text} for question, text in answers],
            "verdicts": table.records(),
            "summary": [answer, *further_answers, *summary_of(subjects)],
            "findings": [finding.record() for finding in findings],
            "adapters": list(map(_adapter, subjects)),
            "together": _collection_record(collection) if collection else None,
            "run": _run_record(subjects, run) if run else None,
        },
    )


def _adapter(subject: Subject) -> dict[str, Any]:
    best, adapter = subject.recommended, subject.examination.adapter
    # The totals cover the requested modules, including those that are left out below.
    chosen = adapter.without([name for name in adapter if name not in subject.examination.readings])
    return {
        "path": subject.path,
        "label": subject.label,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "left_out": list(subject.non_finite),
        "modules": [{**row, **_base_measurements(subject, row["name"])} for row in subject.tables["modules"].records()],
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
            {
                "rank": point.rank,
                **{
                    key: {**asdict(choice), "ranks": list(choice.ranks)}
                    for key, choice in (("uniform", point.uniform), ("budget", point.budget))
                },
            }
            for point in subject.points
        ],
        # Where every ΔW is 0, rank 1 loses nothing, and recommending it would say nothing.
        "recommended_rank": best.rank if best and subject.norm else None,
        "plain_error": subject.update_error,
        **({"explanation": subject.learned.record} if subject.learned and subject.learned.record else {}),
    }


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
        # The dtype is always that of the base, never an assumed one. The key stays because the JSON of reports has it.
        record["merge"] = {"dtype": effect.dtype, "supposed": False, **_numbers(effect, "ratio")}
        record["merge"] |= _numbers(effect.rounding, "gain", "error", "unmoved")
    return record


def _collection_record(collection: Collection) -> dict[str, Any]:
    pairs, energy = collection.pairs, collection.energy
    return {
        # Rows and columns in the order in which the adapters were given; "order" is that of the matrices on the page.
        "cosine": plain(pairs.cosine),
        "cosine_z": plain(pairs.cosine_z),
        "phi": {side: plain(pairs.phi(side)) for side in pairs.overlaps},
        "chance": {side: plain(pairs.chance(side)) for side in pairs.overlaps},
        "shared_initialisation": plain(pairs.shared_initialisation),
        "families": [list(group) for group in collection.families],
        "order": list(collection.order),
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "cosine": plain(pairs.cosines[m]),
                "shared": list(map(json_number, energy.shared[m])),
                "shared_chance": list(map(json_number, energy.shared_chance[m])),
            }
            for m, module in enumerate(pairs.modules)
        ],
        "conflicts": list(map(_interaction, collection.conflicts)),
        "agreements": list(map(_interaction, collection.agreements)),
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
    keys = ("first", "second", "where", "modules", "cosine", "weight")
    return {key: getattr(place, "location" if key == "where" else key) for key in keys}


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
