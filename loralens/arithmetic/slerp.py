"""Means on the sphere: spherical interpolation of two updates, and the Karcher mean of any number of them."""

from math import acos, sin

import numpy as np

from loralens.core.joint import Joint
from loralens.errors import OptionError
from loralens.linalg.factor import Floats

PARALLEL = 0.9995  # |cos| above which interpolation is linear, as in mergekit: sin ω is too small to divide by
ROUNDS = 200  # of the Karcher iteration at most


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
        raise OptionError(f"slerp between weights {w[0]:g} and {w[1]:g}", fix="give weights from 0 that are not all 0")
    t = float(w[1] / w.sum())
    a, b = _coefficients(_cosine(first, second), t)
    return np.asarray(lam * (a * first + b * second), dtype=np.float64)


def _cosine(first: Floats, second: Floats) -> float:
    """The cosine of two cores; 1 if one of them is 0, so that the interpolation is linear."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(np.clip(np.vdot(first, second) / norms, -1.0, 1.0)) if norms else 1.0


def _coefficients(cosine: float, t: float) -> tuple[float, float]:
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = acos(cosine)
    return sin((1 - t) * angle) / sin(angle), sin(t * angle) / sin(angle)


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
        raise OptionError("a spherical mean needs weights from 0 that are not all 0", fix="leave out the signs")
    if not present.size:
        return joint.total()
    units = joint.cores[present].reshape(len(present), -1)
    norms = np.linalg.norm(units, axis=1)
    units = units / norms[:, None]
    shares = w[present] / w.sum()
    u = _mean_direction(units, shares)
    return lam * float(shares @ norms) * u.reshape(joint.cores.shape[1:])


def _mean_direction(units: Floats, shares: Floats) -> Floats:
    """The Karcher mean of rows of length 1."""
    if not shares.any():
        return np.zeros(units.shape[1])
    start = shares @ units
    if np.linalg.norm(start) < 1e-8 * shares.sum():
        raise OptionError("the directions cancel and have no mean", fix="give --method sum, or other weights")
    u = start / np.linalg.norm(start)
    for _ in range(ROUNDS):
        cosines = np.clip(units @ u, -1.0, 1.0)
        rests = units - cosines[:, None] * u
        sines = np.linalg.norm(rests, axis=1)
        angles = np.arctan2(sines, cosines)
        turns = np.divide(angles, sines, out=np.ones_like(sines), where=sines > 0)
        step = (shares / shares.sum() * turns) @ rests
        length = float(np.linalg.norm(step))
        if length < 1e-15:  # a vector of length 1 cannot move by less in float64
            break
        u = np.cos(length) * u + np.sin(length) / length * step
        u /= np.linalg.norm(u)
    return np.asarray(u, dtype=np.float64)
