"""Means on the sphere: spherical interpolation of two updates, and the Karcher mean of any number of them."""

from math import acos, sin

import numpy as np

from loralens.core.joint import Joint
from loralens.errors import OptionError
from loralens.linalg.factor import Floats

PARALLEL = 0.9995  # |cos| above which interpolation is linear, as in mergekit: sin ω is too small to divide by
ROUNDS = 200  # most steps of the Karcher iteration, which ends earlier once a step is below rounding


def slerp(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ (a M_1 + b M_2), float64, shape (p, q): spherical interpolation (Shoemake 1985) of two whole updates.

    a = sin((1−t)ω)/sin ω and b = sin(tω)/sin ω, where ω is the angle between the updates and t = w_2/(w_1 + w_2). The
    interpolation is linear where |cos ω| > 0.9995 or one update is 0. As in mergekit, the coefficients multiply the
    updates themselves and not the updates of length 1. If mergekit is given models instead of adapters, ω is the angle
    between whole weights W + ΔW.

    Raises
    ------
    OptionError
        A negative weight, or weights that add up to 0: t would lie outside [0, 1].
    """
    first, second = joint.cores
    w = joint.strengths
    if w.min() < 0 or not w.sum():
        raise OptionError(
            f"slerp is not defined for the weights {w[0]:g} and {w[1]:g}", fix="give weights of 0 or more, not both 0"
        )
    t = float(w[1] / w.sum())
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    # An update of 0 has no angle to the other; with the cosine 1 the interpolation is linear. Rounding may carry the
    # cosine of parallel updates beyond 1, where acos fails.
    cosine = float(np.clip(np.vdot(first, second) / norms, -1.0, 1.0)) if norms else 1.0
    a, b = 1 - t, t
    if abs(cosine) <= PARALLEL:
        angle = acos(cosine)
        a, b = sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)
    return np.asarray(lam * (a * first + b * second), dtype=np.float64)


def karcher(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ r̄ u, float64, shape (p, q): the mean direction u on the sphere times the mean length r̄.

    u minimises Σ w_t ∠(u, ΔW_t)² (Karcher 1977), and r̄ = Σ w_t‖ΔW_t‖/Σ w_t. The iteration u ← exp_u(Σ w_t log_u ΔW_t)
    runs until a step is below rounding; mergekit stops after 10 steps or at a step of 1e-5. Updates that are 0 have no
    direction and count in r̄ only.

    Raises
    ------
    OptionError
        A negative weight, or weights that add up to 0; directions that cancel, which have no mean.
    """
    w, present = joint.strengths, joint.present
    if w.min() < 0 or not w.sum():
        raise OptionError(
            "a spherical mean needs weights of 0 or more that are not all 0", fix="give such weights, or --method sum"
        )
    # All updates are 0, and so is their sum.
    if not present.size:
        return joint.total()
    units = joint.cores[present].reshape(len(present), -1)
    norms = np.linalg.norm(units, axis=1)
    units = units / norms[:, None]
    # Divided by the weights of all adapters: an update of 0 shortens the mean, though it cannot turn it.
    shares = w[present] / w.sum()
    u = _mean_direction(units, shares)
    return lam * float(shares @ norms) * u.reshape(joint.cores.shape[1:])


def _mean_direction(units: Floats, shares: Floats) -> Floats:
    """The Karcher mean of rows of length 1."""
    if not shares.any():
        return np.zeros(units.shape[1])
    start = shares @ units
    # A sum this short has lost half of its digits to cancellation. Opposite updates have no mean direction at all.
    if np.linalg.norm(start) < 1e-8 * shares.sum():
        raise OptionError("the directions cancel and have no mean", fix="give --method sum, or other weights")
    u = start / np.linalg.norm(start)
    for _ in range(ROUNDS):
        cosines = np.clip(units @ u, -1.0, 1.0)
        tangents = units - cosines[:, None] * u
        sines = np.linalg.norm(tangents, axis=1)
        # arctan2 is accurate for small angles too, where arccos loses half of the digits.
        angles = np.arctan2(sines, cosines)
        # log_u(x) is the tangent of x at u, of the length of the angle between them.
        turns = np.divide(angles, sines, out=np.ones_like(sines), where=sines > 0)
        step = (shares / shares.sum() * turns) @ tangents
        length = float(np.linalg.norm(step))
        # A vector of length 1 cannot move by less in float64.
        if length < 1e-15:
            break
        u = np.cos(length) * u + np.sin(length) / length * step
        u /= np.linalg.norm(u)  # rounding would make it longer or shorter with every round
    return np.asarray(u, dtype=np.float64)
