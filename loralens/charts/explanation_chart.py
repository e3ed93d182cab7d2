"""The chart of an explanation: words by their change and by the number of texts in which they changed."""

from collections.abc import Sequence

from loralens.analysis.explanation import Word
from loralens.charts.spec import Band, Figure, Line, LineChart

NAMED = 20  # words of each list that are drawn


def explanation_figure(more: Sequence[Word], less: Sequence[Word], *, title: str, texts: int) -> Figure:
    """The figure of `explanation_chart` alone."""
    return Figure(title, [Band([explanation_chart(more, less, texts)])])


def explanation_chart(more: Sequence[Word], less: Sequence[Word], texts: int) -> LineChart:
    """Draw the words that become more and less likely, without symbols: a row for each, the strongest at the top."""
    lines = []
    for name, words, ink in (("more likely", more, "c0"), ("less likely", less, "c1")):
        shown = [word for word in words if not word.symbol][:NAMED]
        x, y = [word.change for word in shown], [float(NAMED - place) for place in range(len(shown))]
        labels = [f"{word.text} {word.texts}" for word in shown]
        lines.append(Line(name, x, y, ink, marker="o", style="", labels=labels))
    changes = [x for line in lines for x in line.x] or [0.0]
    low, high = min(changes), max(changes)
    return LineChart(
        f"words and texts of {texts}",
        lines,
        "mean change of log p (nats)",
        "strongest at the top",
        x_range=(low - 0.05 * (high - low) - 0.1, high + 0.2 * (high - low) + 0.1),  # labels stand on the right
        legend=True,
        note="" if any(line.x for line in lines) else "no word beyond random updates",
    )
