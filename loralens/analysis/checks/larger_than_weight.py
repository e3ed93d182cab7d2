"""Updates that are larger than the weight that they adapt."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.examination import Examination

CODES = {
    "update-dominates": "‖ΔW‖ exceeds ‖W‖: the update replaces the weight rather than adapting it. Possible causes are "
    "a scale that is applied twice, the wrong base and a training run that diverged."
}
LARGEST = 1.0  # largest ‖ΔW‖/‖W‖ without a diagnosis: trained adapters have at most a tenth of it, 0.001 to 0.1


def look(exam: Examination) -> Iterator[Diagnosis]:
    """Report every such module, the largest ratio first."""
    for name, effect in sorted(exam.merge_effects.items(), key=lambda item: -item[1].ratio):
        if effect.ratio > LARGEST:
            evidence = f"‖ΔW‖ is {effect.ratio:.3g} times ‖W‖"
            fix = f"check that this is its base, and its scale: `{exam.command('inspect')}`"
            yield Diagnosis("warning", "update-dominates", evidence, fix, name)
