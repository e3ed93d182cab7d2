"""The strengths of the combining study: a best at an end of what was tried says only that more should be tried."""

import combining_study as study

from loralens.arithmetic.methods import METHODS
from tests.conftest import ROOT


def chosen() -> dict[str, float]:
    """Method → ρ, of the table in the report."""
    lines = (ROOT / "reports" / "combining_study.md").read_text("utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {row[0]: float(row[3]) for row in rows if row[0] in METHODS}


def test_no_method_has_its_best_at_an_end_of_the_grid() -> None:
    tried = getattr(study, "WIDER", study.STRENGTHS)
    found = chosen()
    assert len(found) == 18
    assert {name: strength for name, strength in found.items() if not tried[0] < strength < tried[-1]} == {}
