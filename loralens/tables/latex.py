"""Tables as ``tabular`` environments that pdflatex, xelatex and lualatex take without a package.

pdflatex stops at characters such as ‖, Δ and σ, so such characters are written as formulas.
"""

import re
from typing import Any

from loralens.errors import visible
from loralens.tables.numbers import MINUS
from loralens.tables.table import Table

# Characters that LaTeX would take as commands. `str.translate` looks at each character once, so the braces and
# backslashes of a replacement are not replaced again.
# The minus sign becomes a hyphen: the 8-bit fonts of LaTeX have no minus sign in text, and programs that read the table
# expect a hyphen.
_SPECIAL = {MINUS: "-", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_PLAIN = {"–": "--", "…": r"\ldots{}", "“": "``", "”": "''", "’": "'"}
_TEXT = str.maketrans(_SPECIAL | _PLAIN | {c: f"\\{c}" for c in "&%$#_{}"})

# In text the classical fonts of LaTeX show ¡ for <, ¿ for > and a dash for |.
_NAMED = r"""
    < <  > >  | |  ‖ \|  ° ^{\circ}  × \times  · \cdot  ± \pm  ≤ \le  ≥ \ge  ≈ \approx  → \to  ∞ \infty  √ \surd
    ⟨ \langle  ⟩ \rangle  α \alpha  β \beta  ε \epsilon  θ \theta  κ \kappa  λ \lambda  μ \mu  σ \sigma  φ \varphi
    Δ \Delta  Σ \Sigma
"""
_MATHS = dict(re.findall(r"(\S) (\S+)", _NAMED))
_HIGH = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺ᵀ", [*"0123456789-+", r"\top"], strict=True))
_LOW = dict(zip("₀₁₂₃₄₅₆₇₈₉ᵢⱼ", "0123456789ij", strict=True))
# A run of these letters is one formula, so that no two dollar signs stand side by side: they also mark a displayed
# formula.
_FORMULA = re.compile("[" + re.escape("".join([*_MATHS, *_HIGH, *_LOW])) + "]+")
_PIECE = re.compile(f"(?P<high>[{''.join(_HIGH)}]+)|(?P<low>[{''.join(_LOW)}]+)|(?P<sign>.)")


def latex_text(text: str) -> str:
    """Return text as LaTeX. Letters of names, such as Chinese ones, stay as they are."""
    parts, end = [], 0
    for match in _FORMULA.finditer(text):
        parts += [text[end : match.start()].translate(_TEXT), f"${_formula(match[0])}$"]
        end = match.end()
    return "".join([*parts, text[end:].translate(_TEXT)])


def _formula(letters: str) -> str:
    formula = ""
    for piece in _PIECE.finditer(letters):
        if piece["sign"]:
            formula += _MATHS[piece["sign"]]
        else:
            # One pair of braces for the whole run, as TeX refuses a second exponent or index.
            raised = piece["high"] is not None
            formula += ("^{" if raised else "_{") + "".join((_HIGH if raised else _LOW)[c] for c in piece[0]) + "}"
    return formula


def latex(table: Table[Any]) -> str:
    """Return a table as a ``tabular`` environment of LaTeX, which needs no package, below a comment with its title."""
    # Bars made of letters are for terminals and notebooks: fonts of LaTeX do not have them.
    columns = [column for column in table.shown if not column.drawn]
    # LaTeX calls the sides l and r.
    sides = "".join(column.align[0] for column in columns)
    rows = [[column.title for column in columns]]
    rows += [[visible(column.cell(row)) for column in columns] for row in table.rows]
    heading, *lines = (" & ".join(map(latex_text, row)) + r" \\" for row in rows)
    title = [f"% {visible(table.title)}"] if table.title else []
    body = "\n".join([*title, rf"\begin{{tabular}}{{{sides}}}", r"\hline", heading, r"\hline", *lines, r"\hline"])
    return body + "\n" + r"\end{tabular}" + "\n"
