"""Diagnosis: what one check saw, in one module or in the adapter."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from loralens.core.adapter import Level

LEVELS: tuple[Level, ...] = ("error", "warning", "note")  # most serious first
ALONE = 3  # findings without a module that are shown one by one; more of one code have one cause


@final
@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What one check saw.

    Attributes
    ----------
    level : str
        ``error``: it does not work as it is; ``warning``: it may not do what was meant; ``note``: good to know.
    code : str
        A stable name of the kind of finding, for machines.
    evidence : str
        The numbers, in words.
    fix : str
        The command that mends it, or one sentence; empty where there is nothing to mend.
    module : str or None
        None where it is the adapter's.
    adapter : str
        The path of the adapter, as it was given.
    """

    level: Level
    code: str
    evidence: str
    fix: str = ""
    module: str | None = None
    adapter: str = ""

    def record(self) -> dict[str, str | None]:
        """As a JSON object."""
        return {
            "level": self.level,
            "code": self.code,
            "adapter": self.adapter,
            "module": self.module,
            "evidence": self.evidence,
            "fix": self.fix,
        }


def by_cause(findings: Iterable[Diagnosis]) -> list[list[Diagnosis]]:
    """Findings that belong together, in the order of the first of each group.

    Those of one level, code and adapter, if they are about modules or more than `ALONE`; else those that say the same.
    """
    findings = list(findings)
    loose = Counter((finding.level, finding.code, finding.adapter) for finding in findings if not finding.module)
    groups: dict[tuple[str, ...], list[Diagnosis]] = {}
    for finding in findings:
        cause = (finding.level, finding.code, finding.adapter)
        together = finding.module or loose[cause] > ALONE
        key = (*cause, "") if together else (finding.level, finding.code, finding.evidence, finding.fix, "")
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def share(count: int, of: int) -> str:
    """``all 12 modules``, ``3 of 12 modules``."""
    return f"all {of} modules" if count == of > 1 else f"{count} of {of} modules"
