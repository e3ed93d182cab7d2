"""The chart of an adapter on a server: served against predicted changes of log-probabilities."""

import numpy as np
from numpy.typing import NDArray

from loralens.charts.spec import Band, Figure, Line, LineChart
from loralens.errors import OptionError


def liveness_figure(points: NDArray[np.float64], strength: float, *, title: str) -> Figure:
    """Draw the served change of every token against the predicted one, with the lines of strength 1 and of the fit.

    Parameters
    ----------
    points : ndarray of float64, shape (tokens, 3)
        The change of a token as predicted at strength 1, as predicted at the fitted strength, and as served, in nats.
    strength : float
        The fitted strength.

    Raises
    ------
    OptionError
        There are no points.
    """
    if not len(points):
        raise OptionError("there is nothing to draw: no token was compared", fix="see what the server gives")
    live, fitted, served = points.T
    ends = np.array([live.min(), live.max()])
    # Changes are not linear in the strength, so the slope of the fit is not the strength.
    slope = float(live @ fitted / max(float(live @ live), 1e-300))
    lines = [
        Line("token", live.tolist(), served.tolist(), "c0", "o", ""),
        Line("strength 1", ends.tolist(), ends.tolist(), "quiet", style="--"),
        Line(f"strength {strength:.2f}, the best fit", ends.tolist(), (slope * ends).tolist(), "c1"),
    ]
    values = np.concatenate([served, ends])
    margin = 0.03 * float(np.ptp(values)) or 0.5
    limits = float(values.min()) - margin, float(values.max()) + margin
    chart = LineChart(
        "change of log p by the adapter", lines, "predicted (nats)", "served (nats)", y_range=limits, legend=True
    )
    return Figure(title, [Band([chart])])
