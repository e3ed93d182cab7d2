"""The gallery of a survey: what each card says, and where its preview comes from."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.core.adapter import Adapter
from loralens.core.messages import command_line
from loralens.errors import LoraLensError
from loralens.formats.records.training_notes import TrainingNotes
from loralens.reporting.gallery import Card, beside, from_data_url, write_gallery
from loralens.tables.numbers import count, number, size, span
from loralens.verbs.spectra.inspect import training_facts

if TYPE_CHECKING:
    from loralens.verbs.pages.survey import SurveyedAdapter, SurveyResult


def write_survey(result: "SurveyResult", page: Path) -> None:
    """Write the gallery of a survey."""
    cards = [_card(row) for row in result.files]
    write_gallery(result.folder.resolve().name or str(result.folder), result.summary(), cards, page)


def _card(row: "SurveyedAdapter") -> Card:
    try:
        adapter = row.adapter
    except LoraLensError:  # it was removed or changed meanwhile
        adapter = None
    facts = [
        ("family", row.family or ""),
        ("rank", span(row.ranks) if row.ranks else ""),
        ("size", size(row.bytes)),
        ("trained on", row.trained_on or ""),
    ]
    if row.member:
        facts += [("‖ΔW‖F", number(row.member.frobenius)), ("effective rank", f"{row.member.effective_rank:.2f}")]
    thumbnail = (adapter.metadata or {}).get("modelspec.thumbnail", "") if adapter else ""
    return Card(
        row.label,
        row.level,
        row.verdict,
        row.family or "",
        [(name, text) for name, text in facts if text],
        row.trigger_words,
        beside(row.path) or from_data_url(thumbnail),
        [(name, text) for name, text in _details(row, adapter) if text],
        [*row.findings, *([row.refusal] if row.refusal else [])],
        [command_line("loralens", verb, str(row.path)) for verb in ("doctor", "report")] if adapter else [],
    )


def _details(row: "SurveyedAdapter", adapter: Adapter | None) -> Sequence[tuple[str, str]]:
    """What the header says of an adapter, or why it cannot be read."""
    details = [("file", str(row.path)), ("fix", row.fix)]
    if adapter is None:
        return details
    scales = dict.fromkeys((module.scale, str(module.scaling)) for module in adapter.modules.values())
    scale, source = next(iter(scales), (1.0, ""))
    return [
        *details,
        ("format", adapter.format),
        ("applied as trained by", ", ".join(row.clients)),
        ("modules", f"{count(len(adapter), 'module')}, {adapter.parameters:,} parameters"),
        ("scale", f"{number(scale)}, {source}" if len(scales) == 1 else span(row.scales, text=number)),
        ("other tensors", str(len(adapter.extra) or "")),
        *training_facts(TrainingNotes.of(adapter.metadata)),
    ]
