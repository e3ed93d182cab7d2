"""A diagnosis, the result of a check about one module or the whole adapter, and how diagnoses are grouped."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from loralens.choices import Level

LEVELS: tuple[Level, ...] = ("error", "warning", "note")  # most serious first
ALONE = 3  # up to so many findings of one code without a module are shown one by one; more have one common cause


@final
@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of one check about one module or the whole adapter.

    Attributes
    ----------
    level : str
        ``error``: the adapter does not work as it is. ``warning``: it may not do what was meant. ``note``: information.
    code : str
        The stable name of this kind of finding, for programs.
    evidence : str
        What was measured, in words.
    fix : str
        A command or one sentence that says what to do; empty if nothing needs to be done.
    module : str or None
        None if the finding is about the whole adapter.
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
        # In the order of the documented JSON: what a finding is about comes before what was found.
        return {key: getattr(self, key) for key in ("level", "code", "adapter", "module", "evidence", "fix")}


def by_cause(findings: Iterable[Diagnosis]) -> list[list[Diagnosis]]:
    """Groups of findings with one cause, in the order of the first finding of each group.

    Findings of one level, code and adapter form a group if they are about modules, or if there are more than `ALONE`.
    Of other findings, those with equal texts form a group.
    """
    findings = list(findings)
    loose = Counter((finding.level, finding.code, finding.adapter) for finding in findings if not finding.module)
    groups: dict[tuple[str, ...], list[Diagnosis]] = {}
    for finding in findings:
        cause = (finding.level, finding.code, finding.adapter)
        # Many findings without a module, such as one for each odd tensor, have one cause too.
        together = finding.module or loose[cause] > ALONE
        key = (*cause, "") if together else (finding.level, finding.code, finding.evidence, finding.fix, "")
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def share(count: int, of: int) -> str:
    """``all 12 modules``, ``3 of 12 modules``, ``the only module``."""
    if of == 1 == count:
        return "the only module"
    return f"all {of} modules" if count == of else f"{count} of {of} modules"
