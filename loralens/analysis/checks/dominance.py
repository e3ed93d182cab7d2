"""Updates that are larger than the weight that they adapt."""

from collections.abc import Iterator

from loralens.analysis.checks.diagnosis import Diagnosis
from loralens.analysis.checks.patient import Patient

RULES = {
    "update-dominates": "‖ΔW‖ exceeds ‖W‖: the update replaces the weight rather than adapting it. A scale applied "
    "twice, the wrong base or a training that diverged look so."
}
LARGEST = 1.0  # largest ‖ΔW‖/‖W‖ without a diagnosis; trained adapters have 0.001 to 0.1


def look(exam: Patient) -> Iterator[Diagnosis]:
    """Report every such module, the largest ratio first."""
    for name, landing in sorted(exam.landings.items(), key=lambda item: -item[1].ratio):
        if landing.ratio > LARGEST:
            evidence = f"‖ΔW‖ is {landing.ratio:.3g} times ‖W‖"
            fix = f"check that this is its base, and its scale ({exam.command('inspect')})"
            yield Diagnosis("warning", "update-dominates", evidence, fix, name)
