"""The sections that compare adapters, as in the LoRA paper, or follow one: as checkpoints, or as it was watched."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.analysis.interacting_pairs import LARGE, Interaction, far_cosine
from loralens.analysis.two_adapters import SAME_START
from loralens.charts.pair_charts import conflict_map, pair_matrices, phi_maps, shared_energy_map
from loralens.charts.run_charts import trajectory_charts, watched_charts
from loralens.choices import Side
from loralens.reporting.document import Notice, Notices, PageTable, Panel, Paragraph, Part, Picture, Report, Section
from loralens.reporting.sentences import run_sentence
from loralens.reporting.subject import CheckpointRun, Collection, Subject
from loralens.tables.numbers import fixed, join_words, number, percent
from loralens.tables.table import Column, Table

BLOCKS = 4  # blocks whose φ(i, j) is drawn for each pair: evenly spaced ones, so that the page stays small
WIDEST = 64  # directions of a heat map of φ(i, j): more would be cells of less than two pixels
# With at most this many conflicts (or agreements) their table is open at first; at most five times as many are listed,
# those with the largest share in the cosine of the whole updates.
INTERACTIONS = 8
PAIRS = 15  # with at most this many pairs, which six adapters have, their table is open at first
SOURCE = "Hu et al. 2021, §7.2, eq. 4"
SIDES: tuple[Side, ...] = ("in", "out")


def comparison_section(subjects: Sequence[Subject], collection: Collection | None) -> Section:
    """The section of several adapters: pairs, matrices, conflicts, and φ(i, j) of the most similar pairs."""
    lead = (
        "Cosines compare the updates as a whole; φ compares the directions that they use, whatever their strength. "
        "Each number stands next to the one that unrelated adapters would give."
    )
    if collection is None:
        text = "No two of these adapters have a module with the same name and shape, so nothing was compared."
        return Section("together", "Together", lead, [Paragraph(text, warning=True)])
    labels, pairs = [subject.label for subject in subjects], collection.pairs
    several = len(labels) > 2
    # The warning comes first, as it changes how everything below is to be read.
    parts: list[Part] = [
        Paragraph(
            f"{join_words([labels[t] for t in group])} were initialised with the same random A (cosine of A "
            f"≥ {SAME_START:g}). Between them φ of the in side shows the common initialisation, not a common task: "
            "judge by the out side.",
            warning=True,
        )
        for group in collection.families
    ]
    if collection.table:
        parts.append(PageTable(collection.table, folded=len(collection.table.rows) > PAIRS))
    # Matrices of two adapters would have one cell that is not on the diagonal.
    if several:
        matrices = pair_matrices(labels, pairs, collection.order, ("out", "in"))
        parts.append(
            Picture(
                "All pairs",
                "Similar adapters stand side by side, clustered by 1 − |cosine|. A high cosine of A means that two "
                "adapters were initialised with the same random A.",
                "cosine 0; for φ the mark on its colour bar",
                f"{SOURCE} and App. G",
                [Panel("pairs", matrices)],
            )
        )
    chart = shared_energy_map(labels, pairs, collection.energy, collection.order)
    level = percent(chart.scale.chance[0])
    parts.append(
        Picture(
            "Interference",
            "The share of each adapter's ‖ΔW‖² that lies in the directions of all others, on both the in and the out "
            "side; the mean over the modules of a block. Only this share can be changed by adding the others.",
            f"{level} for random directions (the mark on the colour bar)",
            "after Hu et al. 2021, §7.2, for the spans of all others",
            [Panel("interference", [chart])],
        )
    )
    parts += [_conflicts(labels, collection), *_interactions(labels, collection)]
    # All pairs after the first are folded: each takes two rows of heat maps.
    for k, pair in enumerate(collection.compared):
        parts += [part for side in SIDES for part in _phi(labels, collection, pair, side, folded=k > 0)]
    total = len(labels) * (len(labels) - 1) // 2
    if len(collection.compared) < total:
        text = f"φ(i, j) is drawn for the {len(collection.compared)} of {total} pairs of largest |cosine|."
        parts.append(Paragraph(text))
    return Section("together", "Together", lead, parts)


def _conflicts(labels: Sequence[str], collection: Collection) -> Picture:
    pairs, several = collection.pairs, len(labels) > 2
    what = "The most negative cosine of any two adapters in each module" if several else "Cosine of ΔW in each module"
    # Of many cosines some are far from 0 by chance, so the most negative is compared with a level for as many.
    many = (
        "; the most negative of many cosines is farther from 0 than that by chance alone, so only a cosine "
        f"{far_cosine(pairs):.1f} times as far from 0 shows a conflict"
    )
    return Picture(
        "Lowest cosine by module" if several else "Cosine by module",
        f"{what}. Below 0 the two updates work against each other, above 0 in the same direction.",
        f"0 ± {number(float(pairs.spreads.max()), 2)} in a module{many if several else ''}",
        "cosine of updates, as in task arithmetic (Ilharco et al. 2023)",
        [Panel("conflicts", [conflict_map(labels, pairs)])],
    )


def _interactions(labels: Sequence[str], collection: Collection) -> list[Part]:
    far = f"{far_cosine(collection.pairs):.1f} standard deviations from chance"
    rule = f"every module with |cosine| ≥ {LARGE:g} and at least {far}"
    columns: list[Column[Interaction]] = [
        Column("first", lambda row: labels[row.first], "adapter", align="left"),
        Column("second", lambda row: labels[row.second], "and", align="left"),
        Column("where", "location", "where", align="left"),
        Column("modules", "modules", "modules"),
        Column("cosine", "cosine", "cosine", fixed("+.3f")),
        Column(
            "weight",
            "weight",
            "weight",
            fixed("+.4f"),
            about="the share of these modules in the cosine of the whole updates",
        ),
    ]
    parts: list[Part] = []
    for verb, places in (("work against each other", collection.conflicts), ("agree", collection.agreements)):
        if places:
            table = Table(f"Where two adapters {verb}: {rule}", columns, places[: 5 * INTERACTIONS])
            parts.append(PageTable(table, folded=len(places) > INTERACTIONS))
        else:
            # The rule is stated here too, because a looser rule might have found some.
            parts.append(Paragraph(f"No two adapters {verb} in any module ({rule})."))
    return parts


def _phi(
    labels: Sequence[str], collection: Collection, pair: tuple[int, int], side: Side, *, folded: bool
) -> list[Part]:
    """Heat maps of φ(i, j): some blocks, every kind."""
    # A module whose ΔW is 0 in one of the two has no directions to compare.
    overlaps = {name: comparison.overlaps[side] for name, comparison in collection.compared[pair].items()}
    alive = {name: overlap for name, overlap in overlaps.items() if overlap.phi.size}
    if not alive:
        return []
    maps, scale, _ = phi_maps(alive, blocks=BLOCKS, widest=WIDEST)
    charts = [chart for chart in maps.charts if chart is not None]
    levels, common = scale.levels, "; after a common initialisation the in side is high without a common task"
    first, second = (labels[i] for i in pair)
    not_drawn = f" {len(charts)} of {len(alive)} modules are drawn." if len(charts) < len(alive) else ""
    key = f"phi-{pair[0] + 1}-{pair[1] + 1}-{side}"
    return [
        Picture(
            f"φ(i, j), {side} side: {first} and {second}",
            f"How much of the i leading {side} directions of {first} (down) lies in the j leading ones of {second} "
            f"(across). φ is 1 if one set contains the other.{not_drawn}",
            f"max(i, j)/n, here {number(min(levels), 2)} to {number(max(levels), 2)}{common if side == 'in' else ''}",
            f"{SOURCE}; drawn as its Figures 3 and 4",
            [Panel(key, charts, keys=maps.keys)],
            folded=folded,
        )
    ]


def run_section(run: CheckpointRun) -> Section:
    """The section of a training run: a sentence, curves over the steps, and a table of checkpoints."""
    charts = trajectory_charts(run.trajectory, run.steps, run.losses)
    picture = Picture(
        "From checkpoint to checkpoint",
        "Norm, direction and effective rank of ΔW over the steps, and the loss where it was logged.",
        "cosine 0; φ " + ", ".join(f"{number(x, 3)} ({side} side)" for side, x in run.trajectory.chance.items()),
        "Hu et al. 2021, §7.2, over training steps",
        # The chart of losses has no lines if no loss was logged.
        [Panel("run", [chart for chart in charts if chart.lines])],
    )
    lead = "These are checkpoints of one training run. The direction of each is compared with that of the last."
    table = [PageTable(run.table)] if run.table else []
    return Section("run", "The run", lead, [Paragraph(run_sentence(run)), picture, *table])


def watched_report(
    name: str,
    table: Table[Any],
    *,
    sentences: Sequence[str],
    warnings: Sequence[tuple[int, Mapping[str, Any]]],
    command: str,
    record: Mapping[str, Any],
) -> Report:
    """The page of a run from the table of its snapshots, in order of steps.

    ``sentences`` are the conclusion, whose first one is the headline; each of the ``warnings`` has its step.
    """
    notices = [
        Notice("warning", str(found["code"]), f"step {step}", [str(found["text"])], str(found["fix"]))
        for step, found in warnings
    ]
    good = "No snapshot showed that the run went wrong."
    last = table.rows[-1]
    picture = Picture(
        "From snapshot to snapshot",
        "Norm, direction and effective rank of ΔW over the steps, and how far A has moved from its initialisation.",
        f"cosine 0; φ {number(last.chance_out, 3)} (out side), {number(last.chance_in, 3)} (in side)",
        "Hu et al. 2021, §7.2, over training steps",
        [Panel("run", watched_charts(table.rows))],
    )
    lead = "A watcher measured the adapter during training. The direction of each snapshot is compared with the last."
    return Report(
        title=name,
        command=command,
        headline=sentences[0],
        remarks=sentences[1:],
        sections=[
            Section("findings", "Warnings", "Each warning is given once.", [Notices(notices, good)]),
            Section("run", "The run", lead, [picture, PageTable(table)]),
        ],
        record=record,
    )
