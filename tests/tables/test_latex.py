"""Tables of LaTeX: letters that pdflatex has no font for become formulas, and characters of its own are quoted."""

import pytest

from loralens.tables import Column, Table
from loralens.tables.numbers import spark
from loralens.tables.render import latex, latex_text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("‖ΔW‖F", r"$\|\Delta$W$\|$F"),
        ("σ₁/σ₁(W)", r"$\sigma_{1}$/$\sigma_{1}$(W)"),
        ("UᵀWV: ΔW", r"U$^{\top}$WV: $\Delta$W"),
        ("‖ΔW₁−ΔW₂‖", r"$\|\Delta$W$_{1}$-$\Delta$W$_{2}\|$"),
        ("384 × 384", r"384 $\times$ 384"),
        ("|z| > 3", r"$|$z$|$ $>$ 3"),
        ("10⁻¹²", "10$^{-12}$"),
        ("max °", r"max $^{\circ}$"),
        ("blocks 0–23", "blocks 0--23"),
        ("$‖a_b‖ 5 %", r"\$$\|$a\_b$\|$ 5 \%"),
        ("a\\b^c~{d}&#", r"a\textbackslash{}b\textasciicircum{}c\textasciitilde{}\{d\}\&\#"),
        ("模型", "模型"),
    ],
)
def test_letters(text: str, expected: str) -> None:
    assert latex_text(text) == expected


def test_a_table_has_its_title_as_a_comment_and_no_drawings() -> None:
    columns = (
        Column("most", lambda row: row[0], "σ₁"),
        Column("bars", list, "spectrum", spark, align="left", drawn=True),
    )
    lines = latex(Table("two\nlines: ‖ΔW‖", columns, [[2.0, 1.0]])).splitlines()
    assert lines[:2] == ["% two\\x0alines: ‖ΔW‖", r"\begin{tabular}{r}"]
    assert lines[3:] == [r"$\sigma_{1}$ \\", r"\hline", r"2.0 \\", r"\hline", r"\end{tabular}"]
