"""The gallery of a survey: what each card says, and where its preview comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loralens.core.messages import command_line
from loralens.formats.records.collection import metadata_of
from loralens.formats.records.training_notes import TrainingNotes
from loralens.reporting.gallery import Card, beside, from_data_url, write_gallery
from loralens.tables.numbers import number, size, span
from loralens.verbs.spectra.inspect import training_facts

if TYPE_CHECKING:
    from loralens.verbs.pages.survey import SurveyedAdapter, SurveyResult


def write_survey(result: "SurveyResult", page: Path) -> None:
    """Write the gallery of a survey."""
    cards = [_card(row) for row in result.files]
    write_gallery(result.folder.resolve().name or str(result.folder), result.summary(), cards, page)


def _card(row: "SurveyedAdapter") -> Card:
    metadata = metadata_of(row.path) or {}
    facts = [
        ("family", row.family or ""),
        ("rank", span(row.ranks) if row.ranks else ""),
        ("size", size(row.bytes)),
        ("trained on", row.trained_on or ""),
    ]
    if row.member:
        facts += [("‖ΔW‖F", number(row.member.frobenius)), ("effective rank", f"{row.member.effective_rank:.2f}")]
    return Card(
        row.label,
        row.level,
        row.verdict,
        row.family or "",
        [(name, text) for name, text in facts if text],
        row.trigger_words,
        beside(row.path) or from_data_url(metadata.get("modelspec.thumbnail", "")),
        [(name, text) for name, text in _details(row, metadata) if text],
        [*row.findings, *([row.refusal] if row.refusal else [])],
        _commands(row) if row.format else [],
    )


def _commands(row: "SurveyedAdapter") -> list[str]:
    path = str(row.path)
    page = f"{Path(row.label.removesuffix('.safetensors')).name}.html"
    return [command_line("loralens", "doctor", path), command_line("loralens", "report", path, "-o", page)]


def _details(row: "SurveyedAdapter", metadata: Mapping[str, str]) -> Sequence[tuple[str, str]]:
    """What the header says of an adapter, or why it cannot be read."""
    return [
        ("file", str(row.path)),
        ("fix", row.fix),
        ("format", row.format or ""),
        ("applied as trained by", ", ".join(row.clients)),
        ("modules", f"{row.modules:,}, with {row.parameters:,} parameters" if row.modules else ""),
        ("scale", span(row.scales, text=number) if row.scales else ""),
        *training_facts(TrainingNotes.of(metadata)),
    ]
