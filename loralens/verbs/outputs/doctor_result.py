"""The result of `doctor`: findings about adapters, in the order of their weight and grouped by their causes."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralens.analysis.checks.diagnosis import LEVELS, Diagnosis, by_cause
from loralens.analysis.checks.weighted_sum import SAME_ADAPTER
from loralens.choices import Level
from loralens.core.adapter import Adapter
from loralens.core.names import kind
from loralens.tables.numbers import count
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

WORST = 3  # modules that the text names for findings with one cause; --verbose and --json list all of them
CODES = 4  # kinds of findings that the conclusion names


@dataclass(frozen=True, slots=True)
class DoctorResult(Tabular):
    """The findings about adapters, most serious first; iteration is over the findings.

    Attributes
    ----------
    adapters : mapping of str to Adapter or None
        The adapters by their labels; None if one could not be read.
    base : str or None
        The base model that they were compared with.
    fail_on : str or None
        The least serious level that makes `answer` false; None if no finding does.
    causes_told : int or None
        How many causes the text tells of, the most serious first; None for all.
    modules_told : int or None
        How many modules the text names of each cause; None for all.
    """

    findings: Sequence[Diagnosis]
    adapters: Mapping[str, Adapter | None]
    base: str | None = None
    fail_on: Level | None = None
    causes_told: int | None = None
    modules_told: int | None = WORST

    def __iter__(self) -> Iterator[Diagnosis]:
        return iter(self.findings)

    def __repr__(self) -> str:
        return f"DoctorResult({_levels(Counter(finding.level for finding in self.findings))})"

    @property
    def answer(self) -> bool:
        """Whether there is no finding of the level ``fail_on`` or a more serious one; true if no level was given."""
        if self.fail_on is None:
            return True
        return all(LEVELS.index(finding.level) > LEVELS.index(self.fail_on) for finding in self.findings)

    def numbers(self) -> dict[str, Any]:
        """What matters of one adapter among several, as JSON values; causes are counted, as in the text."""
        levels = Counter(cause[0].level for cause in self.causes)
        codes = list(dict.fromkeys(cause[0].code for cause in self.causes))
        read = [adapter for adapter in self.adapters.values() if adapter is not None]
        # Findings that were written earlier do not tell the number of modules.
        return {
            "modules": sum(map(len, read)) if read else None,
            **{f"{level}s": levels[level] for level in LEVELS},
            "codes": codes,
        }

    def listing(self) -> list[Table[Diagnosis]]:
        """The findings, one row for every module concerned."""
        return [Table("findings", FINDING_COLUMNS, self.findings)]

    @property
    def causes(self) -> list[list[Diagnosis]]:
        """The findings in groups with one cause, most serious first; no group has those of two adapters."""
        groups = [
            group
            for label in self.adapters
            for group in by_cause(finding for finding in self.findings if finding.adapter == label)
        ]
        return sorted(groups, key=lambda group: LEVELS.index(group[0].level))

    def conclusion(self) -> list[str]:
        """Whether anything is wrong: how many causes of which level there are, and of which kinds."""
        (label, *further) = self.adapters
        adapters = f"these {len(self.adapters)} adapters" if further else label
        causes = self.causes
        if not causes:
            return [f"Nothing is wrong with {adapters}, as far as can be seen."]
        # That one adapter is a copy of another is the most important fact about several adapters.
        same = [f"{f.adapter} is {f.evidence}." for f in self.findings if f.evidence.startswith(SAME_ADAPTER)]
        levels = _levels(Counter(cause[0].level for cause in causes))
        codes = list(dict.fromkeys(cause[0].code for cause in causes))
        named = ", ".join(codes[:CODES]) + (" …" if len(codes) > CODES else "")
        # Notes are not faults, but a newcomer could take a list of them for faults.
        fault = causes[0][0].level != "note"
        sentence = f"{levels} about {adapters}" if fault else f"Nothing is wrong with {adapters}; {levels}"
        return [f"{sentence[0].upper()}{sentence[1:]}: {named}.", *same[:1]]

    def sentences(self) -> list[str]:
        """The findings of every adapter, those with one cause together."""
        shown = self.causes[: self.causes_told]
        lines = [line for label in self.adapters for line in self._adapter_lines(label, shown)]
        hidden = len(self.causes) - len(shown)
        return [*lines, f"{count(hidden, 'more cause')} (--verbose shows all)"] if hidden else lines

    def _adapter_lines(self, label: str, shown: Sequence[Sequence[Diagnosis]]) -> list[str]:
        adapter = self.adapters[label]
        causes = [cause for cause in self.causes if cause[0].adapter == label]
        # Where only the most serious causes are told, an adapter that has none of them needs no heading.
        if causes and not any(cause in shown for cause in causes):
            return []
        read = count(len(adapter), "module") if adapter is not None else "not read"
        against = f", against {self.base}" if self.base else ""
        # Causes are counted and not findings: a fault in all of 200 modules is one thing to mend.
        levels = _levels(Counter(cause[0].level for cause in causes))
        lines = [f"{label} ({read}{against}): {levels}"]
        for cause in causes:
            if cause in shown:
                lines += _cause_lines(cause, len(adapter or ()), self.modules_told)
        return [*lines, ""]

    def record(self) -> dict[str, Any]:
        """The findings as a JSON object."""
        return {"findings": Table("", FINDING_COLUMNS, self.findings).records()}


def _levels(counts: Mapping[Level, int]) -> str:
    """``1 error, 2 warnings``, the most serious level first."""
    return ", ".join(count(counts[level], level) for level in LEVELS if counts.get(level)) or "nothing found"


def _cause_lines(diagnoses: Sequence[Diagnosis], of: int, most: int | None) -> list[str]:
    """The text of findings that have one cause, in an adapter of ``of`` modules; at most ``most`` modules are named."""
    first = diagnoses[0]
    head = f"  {first.level}: {first.code}: "
    if len(diagnoses) == 1:  # on one line, as most findings are
        lines = [head + (f"{first.module}: " if first.module else "") + first.evidence]
    else:
        modules = {finding.module for finding in diagnoses if finding.module}
        # A fault of one kind in all blocks is the common case, and names its cause.
        kinds = {kind(name) for name in modules}
        alike = f", of the kind {kinds.pop()}" if len(kinds) == 1 else ""
        lines = [head + (f"{len(modules)} of {of} modules{alike}" if modules else f"{len(diagnoses)} of this kind")]
        # The checks list the worst modules of a cause first.
        for finding in diagnoses[:most]:
            lines.append("    " + (f"{finding.module}: " if finding.module else "") + finding.evidence)
        if most is not None and len(diagnoses) > most:
            lines.append(f"    and {len(diagnoses) - most} more (--verbose names them)")
    return [*lines, f"    fix: {first.fix}"] if first.fix else lines


# No table for people: evidence and remedies are sentences, which a column would cut. --csv and --json use the columns.
FINDING_COLUMNS: tuple[Column[Diagnosis], ...] = (
    Column("level", lambda row: row.level, "level", align="left", priority=ALWAYS),
    Column("code", lambda row: row.code, "code", align="left", priority=ALWAYS),
    Column("adapter", lambda row: row.adapter, "adapter", align="left", priority=3),
    Column("module", lambda row: row.module, "module", align="left", priority=8),
    Column("evidence", lambda row: row.evidence, "evidence", align="left", priority=7),
    Column("fix", lambda row: row.fix, "fix", align="left", priority=2),
)
