"""Methods that weight whole updates: the sum, norms that are kept, projections, SLERP and Model Stock."""

from math import acos, sin

import numpy as np

from loralens.core.joint import Joint
from loralens.errors import OptionError
from loralens.linalg.factor import Floats


def task_arithmetic(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ Σ w_t M_t, float64, shape (p, q): task arithmetic (Ilharco et al. 2023), exact.

    PEFT's ``linear`` adds the factors instead, which gives a different update: (Σ√w_t B_t)(Σ√w_t A_t).
    """
    return lam * joint.total()


def average(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ Σ w_t M_t / Σ w_t, float64, shape (p, q): the mean of the updates.

    Adapters that lack the module count as ΔW = 0.

    Raises
    ------
    OptionError
        The weights add up to 0.
    """
    # The weights of all adapters, also of those that lack the module, so that every module is divided by one number.
    weight_sum = float(np.sum(joint.strengths))
    if weight_sum == 0:
        raise OptionError("the weights add up to 0, so there is no average", fix="give --method sum, or other weights")
    return lam * joint.total() / weight_sum


def equalise_norms(x: Floats, beta: float) -> Floats:
    """Scale the updates x_t (T, p, q) to the norms β‖x_t‖ + (1 − β) mean‖x‖; updates of 0 do not count in the mean."""
    norms = np.linalg.norm(x, axis=(1, 2))
    nonzero = norms > 0
    if not nonzero.any():
        return x
    targets = beta * norms + (1 - beta) * norms[nonzero].mean()
    # An update of 0 has no direction in which it could grow to the norm of the others.
    factors = np.divide(targets, norms, out=np.zeros_like(norms), where=nonzero)
    return np.asarray(factors[:, None, None] * x)


def equal_norms(joint: Joint, *, lam: float = 1.0, beta: float = 0.0) -> Floats:
    """λ Σ w_t M̃_t, float64, shape (p, q), where all M̃_t have the mean Frobenius norm of the updates.

    ``beta`` in [0, 1] is the part of the differences in norm that stays: 1 gives the plain sum. This rescaling is the
    first step of Compress-then-Merge (arXiv 2606.03723).
    """
    return lam * np.tensordot(joint.strengths, equalise_norms(joint.cores, beta), 1)


def null_space(joint: Joint, *, lam: float = 1.0, mu: float = np.inf, rank: int = 0) -> Floats:
    """λ (x_1 + Σ_{t>1} x_t (1 − μ/(1+μ) V Vᵀ)), float64, shape (p, q), with x_t = w_t M_t.

    V holds the leading ``rank`` right singular directions of the first update; 0 stands for all of its numerical rank.
    With μ = ∞, the default, the other updates no longer respond to the directions of the input that the first one
    reads; with μ = 0 the result is the sum. NP-LoRA (Chen et al. 2025, arXiv 2511.11051) combines a style, the first,
    with a content, the second; more than two adapters are our extension. The order of the adapters matters.
    """
    first, *other_updates = joint.weighted
    # All directions if rank is 0: a slice to None has no end.
    V = joint.decompose(first).Vh[: rank or None].T
    share = 1.0 if np.isinf(mu) else mu / (1 + mu)  # ∞/∞ is NaN
    # The projection is linear, so the others are added before it.
    other_sum = np.sum(other_updates, axis=0) if other_updates else np.zeros_like(first)
    return np.asarray(lam * (first + other_sum - share * (other_sum @ V) @ V.T))


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
    return np.asarray(lam * (a * first + b * second))


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
    return u


def model_stock(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ t Σ x_t / N with x_t = w_t M_t, float64, shape (p, q), and t = N c/(1 + (N − 1) c).

    c is the mean cosine of all pairs of the N updates that are not 0. If the updates agree, t is 1; if they are
    orthogonal, t is 0. This is Model Stock (Jang et al. 2024, arXiv 2403.19522), one module at a time. Where we differ:
    a negative c counts as 0. The geometry of the paper does not cover it, and t may become infinite.
    """
    present = joint.present
    if not present.size:
        return joint.total()
    x = joint.weighted[present].reshape(present.size, -1)
    norms = np.linalg.norm(x, axis=1)
    x, norms = x[norms > 0], norms[norms > 0]
    # An update that the adapter has is also 0 if its weight is 0.
    count = len(x)
    if count < 2:
        return lam * joint.total()
    cosines = (x @ x.T) / np.outer(norms, norms)
    # Without the diagonal: every update has the cosine 1 with itself.
    c = max(0.0, float((cosines.sum() - np.trace(cosines)) / (count * (count - 1))))
    t = count * c / (1 + (count - 1) * c)
    return lam * t / count * joint.total()
