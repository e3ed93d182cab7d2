"""The chart of an explanation: words by their change and by the number of texts in which they changed."""

from collections.abc import Sequence

from loralens.analysis.explanation import Word
from loralens.charts.spec import Band, Figure, Line, LineChart

NAMED = 15  # words of each list that are written beside their mark; more would hide each other


def explanation_figure(more: Sequence[Word], less: Sequence[Word], *, title: str, texts: int) -> Figure:
    """Draw the words that become more and less likely in any of so many texts, without symbols."""
    lines = []
    for name, words, ink in (("more likely", more, "c0"), ("less likely", less, "c1")):
        shown = [word for word in words if not word.symbol and word.texts is not None]
        labels = [word.text if place < NAMED else "" for place, word in enumerate(shown)]
        x, y = [word.change for word in shown], [float(word.texts or 0) for word in shown]
        lines.append(Line(name, x, y, ink, marker="o", style="", labels=labels))
    chart = LineChart(
        title,
        lines,
        "mean change of log p (nats)",
        f"texts of {texts}",
        legend=True,
        note="" if any(line.x for line in lines) else "no word beyond random updates",
    )
    return Figure(title, [Band([chart])])
