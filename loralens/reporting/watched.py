"""The page of a watched run, which is made from its log: the signs, curves over the steps, and a table of looks."""

from collections.abc import Mapping, Sequence
from typing import Any

from loralens.charts.trajectory import WatchedPoint, watched_charts
from loralens.reporting.document import Notice, Notices, PageTable, Picture, Report, Section
from loralens.tables.numbers import number
from loralens.tables.table import Table


def watched_report(
    name: str,
    looks: Sequence[WatchedPoint],
    table: Table[Any],
    *,
    sentences: Sequence[str],
    warnings: Sequence[tuple[int, Mapping[str, Any]]],
    command: str,
    record: Mapping[str, Any],
) -> Report:
    """The page of a run from its looks in order of steps.

    ``sentences`` are the conclusion, whose first one is the headline; ``warnings`` are the signs, each with its step.
    """
    notices = [
        Notice("warning", str(sign["code"]), f"step {step}", [str(sign["text"])], str(sign["fix"]))
        for step, sign in warnings
    ]
    signs = Notices(notices, "No look showed a sign that the run went wrong.")
    last = looks[-1]
    chance = f"cosine 0; φ {number(last.chance_out, 3)} (out side), {number(last.chance_in, 3)} (in side)"
    picture = Picture(
        "run",
        "From look to look",
        watched_charts(looks),
        "Norm, direction and effective rank of ΔW over the steps, and how far A has moved from its start.",
        chance,
        "Hu et al. 2021, §7.2, over training steps",
        f"Curves over {len(looks)} looks to step {last.step}.",
    )
    lead = "A watcher looked at the adapter while it was trained. The direction at each look is compared with the last."
    return Report(
        title=name,
        command=command,
        summary=list(sentences),
        headline=sentences[0],
        remarks=list(sentences[1:]),
        sections=[
            Section("findings", "Signs", "Signs that a run goes wrong; each is reported once.", [signs]),
            Section("run", "The run", lead, [picture, PageTable(table)]),
        ],
        modules=[],
        record=dict(record),
    )
