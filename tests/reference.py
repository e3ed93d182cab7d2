"""Every formula again: dense, float64 or 100 digits, slow and obvious. No shared code with the package."""

import functools
import math

import mpmath
import numpy as np

DIGITS = 100  # graded factors: condition 1e16 per product, squared twice on the way to an eigenvalue


def dense_product(B, A):
    return B.astype(np.float64) @ A.astype(np.float64)


def dense_singular_values(B, A):
    """Good to 1e-16 of the largest, so no judge of graded factors: use `exact_values_of_full_rank` there."""
    return np.linalg.svd(dense_product(B, A), compute_uv=False)


def exact_values_of_full_rank(B, A):
    """The r nonzero singular values, from the r × r matrix Lᵀ (A Aᵀ) L with L Lᵀ = Bᵀ B; 100 digits, and faster."""
    with mpmath.workdps(DIGITS):
        X, Y = mpmath.matrix(B.astype(np.float64).tolist()), mpmath.matrix(A.astype(np.float64).tolist())
        L = mpmath.cholesky(X.T * X)
        eigenvalues = mpmath.eigsy(L.T * (Y * Y.T) * L, eigvals_only=True)
        values = sorted((float(mpmath.sqrt(abs(x))) for x in eigenvalues), reverse=True)
    return np.array(values)


def size(B, A):
    """‖B‖₂‖A‖₂, the unit of a backward error."""
    return float(np.linalg.norm(B.astype(np.float64), 2) * np.linalg.norm(A.astype(np.float64), 2))


def frobenius(s):
    return math.sqrt(math.fsum(x * x for x in s))


def nuclear(s):
    return math.fsum(s)


def numerical_rank(s, shape):
    return sum(1 for x in s if x > max(s) * max(shape) * 2.0**-52)


def stable_rank(s):
    return math.fsum(x * x for x in s) / max(s) ** 2


def effective_rank(s, power=1):
    total = math.fsum(x**power for x in s)
    p = [x**power / total for x in s if x > 0]
    return math.exp(-math.fsum(x * math.log(x) for x in p))


def participation_ratio(s):
    return math.fsum(x * x for x in s) ** 2 / math.fsum(x**4 for x in s)


def energy_rank(s, fraction):
    """Smallest k that keeps the fraction, in exact rational arithmetic on the numbers given."""
    with mpmath.workdps(60):
        squares = [mpmath.mpf(float(x)) ** 2 for x in s]
        wanted = mpmath.mpf(fraction) * mpmath.fsum(squares)
        return next(k for k in range(1, len(s) + 1) if mpmath.fsum(squares[:k]) >= wanted)


# ---------------------------------------------------------------- intruder dimensions (arXiv 2410.21228, Algorithm 1)


def intruder_scores(W, D, top):
    """σ and max_i |⟨y_j, u_i⟩| of the leading directions of W + D against all thin left vectors of W."""
    W = W.astype(np.float64)
    U0 = np.linalg.svd(W, full_matrices=False)[0]
    U, s, _ = np.linalg.svd(W + D, full_matrices=False)
    scores = []
    for j in range(min(top, len(s))):
        largest = 0.0
        for i in range(U0.shape[1]):
            largest = max(largest, abs(float(sum(U[:, j] * U0[:, i]))))
        scores.append(largest)
    return s[:top], np.array(scores)


def intruders_scaled(W, D, indices, strength):
    """W + D with the singular values of these directions multiplied."""
    U, s, Vh = np.linalg.svd(W.astype(np.float64) + D, full_matrices=False)
    for j in indices:
        s[j] *= strength
    return U @ np.diag(s) @ Vh


# Rounding W + D to a narrow dtype.


@functools.cache
def representable(dtype):
    """Every finite number ≥ 0 of a dtype of one or two bytes, smallest first, by its bit patterns."""
    bits = np.arange(2 ** (8 * np.dtype(dtype).itemsize), dtype=f"u{np.dtype(dtype).itemsize}")
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = bits.view(dtype).astype(np.float64)
    return np.unique(np.abs(values[np.isfinite(values)]))


# Truncation that knows the data: full whitening with C (in, in), and with G (out, out), as SVD-LLM and K-FAC have it.

MIXED_IN = 1e-6  # white inputs, as a share of the energy of the update on the data


def mixed_in(D, C):
    """C + εI."""
    return C + MIXED_IN * np.trace(D @ C @ D.T) / np.linalg.norm(D) ** 2 * np.eye(len(C))


def whitened_truncation(D, C, k, G=None):
    """The best D' of rank k for E‖(D − D')x‖², or ‖G^½(D − D')C^½‖: by way of D L, L Lᵀ = C, and back by L⁻¹."""
    C = mixed_in(D, C)
    L, H = np.linalg.cholesky(C), np.eye(len(D))
    if G is not None:
        eta = MIXED_IN * np.trace(G @ D @ C @ D.T) / np.trace(D @ C @ D.T)
        H = np.linalg.cholesky(G + eta * np.eye(len(G))).T
    U, s, Vh = np.linalg.svd(H @ D @ L, full_matrices=False)
    best = np.linalg.solve(H, (U[:, :k] * s[:k]) @ Vh[:k])
    return np.linalg.solve(L.T, best.T).T, s


def on_data(D, X):
    """√Σ‖D x‖² over the rows x of X."""
    return float(np.linalg.norm(D @ X.T))


# Amplification (Hu et al. 2021, §7.3 and App. H.4).


def amplification_row(B, A, scale, W, i):
    """‖ΔWᵢ‖, ‖UᵢᵀWVᵢ‖, √Σ_{j ≤ i} σⱼ(W)² and i/√(out·in)·‖W‖ from dense SVDs, entry by entry."""
    U, s, Vh = np.linalg.svd(scale * dense_product(B, A), full_matrices=False)
    W = W.astype(np.float64)
    entries = [[math.fsum(math.fsum(U[:, a] * W[:, c]) * Vh[b, c] for c in range(W.shape[1])) for b in range(i)]
               for a in range(i)]  # fmt: skip
    top = np.linalg.svd(W, compute_uv=False)[:i]
    return frobenius(s[:i]), frobenius(np.ravel(entries)), frobenius(top), i * frobenius(W.ravel()) / math.sqrt(W.size)


def subspace_phi(X, Y, i, j):
    """φ(i, j) of orthonormal columns, from the projections onto both spaces."""
    P, Q = X[:, :i] @ X[:, :i].T, Y[:, :j] @ Y[:, :j].T
    return float(np.trace(P @ Q)) / min(i, j)


# Truncation and budgets


def truncated_error(dense, rank):
    """‖M − M_k‖_F / ‖M‖_F and ‖M − M_k‖₂ / ‖M‖₂ of the best rank-k M_k, from a dense SVD."""
    U, s, Vh = np.linalg.svd(dense, full_matrices=False)
    best = U[:, :rank] @ np.diag(s[:rank]) @ Vh[:rank]
    return (np.linalg.norm(dense - best) / np.linalg.norm(dense), np.linalg.norm(dense - best, 2) / s[0])


def best_gain(gains, costs, capacity, least):
    """The most that ranks within a capacity save, by trying all of them."""
    import itertools

    choices = itertools.product(*(range(min(least, len(g)), len(g) + 1) for g in gains))
    fitting = [c for c in choices if sum(k * cost for k, cost in zip(c, costs, strict=True)) <= capacity]
    return max((sum(sum(g[:k]) for g, k in zip(gains, c, strict=True)) for c in fitting), default=None)


def dora(W, update, m):
    """m · (W + ΔW) / ‖W + ΔW‖, one m and one norm for each output."""
    return dora_weight(W + update, m, 0)


# Collections of adapters, from dense updates (one list of matrices an adapter, in the order of the modules).


def whole_cosine(first, second):
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖‖ΔW₂‖) of whole updates, entry by entry."""
    x, y = (np.concatenate([D.ravel() for D in one]) for one in (first, second))
    return math.fsum(x * y) / frobenius(x) / frobenius(y)


def whole_cosine_spread(first, second):
    """Standard deviation of that cosine where every module has random directions: Σ‖D‖²‖E‖²/(out·in) over Σ Σ."""
    own = [(frobenius(D.ravel()) ** 2, frobenius(E.ravel()) ** 2, D.size) for D, E in zip(first, second, strict=True)]
    sums = math.fsum(d for d, _, _ in own) * math.fsum(e for _, e, _ in own)
    return math.sqrt(math.fsum(d * e / size for d, e, size in own) / sums)


def column_space(matrices, tolerance):
    """An orthonormal basis of the columns of all, from the dense SVD of their orthonormal bases side by side."""
    stacks = []
    for M in matrices:
        U, s, _ = np.linalg.svd(M, full_matrices=False)
        stacks.append(U[:, s > 1e-12 * max(s[0], 1e-300)])
    U, s, _ = np.linalg.svd(np.hstack(stacks), full_matrices=False)
    return U[:, s > tolerance]


def divided_energy(D, others, tolerance):
    """‖P_U D P_V‖², ‖(1 − P_U) D (1 − P_V)‖² over ‖D‖², and the dimensions of both spans."""
    U, V = column_space(others, tolerance), column_space([M.T for M in others], tolerance)
    P, Q = U @ U.T, V @ V.T
    whole = np.linalg.norm(D) ** 2
    rest = (np.eye(len(P)) - P) @ D @ (np.eye(len(Q)) - Q)
    return np.linalg.norm(P @ D @ Q) ** 2 / whole, np.linalg.norm(rest) ** 2 / whole, U.shape[1], V.shape[1]


def first_rows_cosine(A1, A2):
    """Cosine of the entries of the rows that both have."""
    r = min(len(A1), len(A2))
    x, y = A1[:r].astype(np.float64).ravel(), A2[:r].astype(np.float64).ravel()
    return math.fsum(x * y) / frobenius(x) / frobenius(y)


# Similarity of two updates (Hu et al. 2021, §7.2 and App. G), from dense matrices.


def leading_columns(D, count, side):
    """Singular directions of a dense matrix on one side."""
    U, _, Vh = np.linalg.svd(D, full_matrices=False)
    return (Vh.T if side == "in" else U)[:, :count]


def phi_of(X, Y):
    """φ(i, j) of two orthonormal bases, one entry after the other."""
    phi = np.zeros((X.shape[1], Y.shape[1]))
    for i in range(1, X.shape[1] + 1):
        for j in range(1, Y.shape[1] + 1):
            phi[i - 1, j - 1] = np.linalg.norm(X[:, :i].T @ Y[:, :j], "fro") ** 2 / min(i, j)
    return phi


def dense_cosine(D1, D2):
    return math.fsum((D1 * D2).ravel()) / (np.linalg.norm(D1) * np.linalg.norm(D2))


def dense_cka(D1, D2, side):
    """Of outputs on white inputs (in), or of the transposed maps (out)."""
    one, two = (D.T @ D if side == "in" else D @ D.T for D in (D1, D2))
    return float(np.sum(one * two) / (np.linalg.norm(one) * np.linalg.norm(two)))


def exact_angles(X, Y):
    """Principal angles of the spans of X and Y, smallest first, in 100 digits, from arccos alone."""
    with mpmath.workdps(DIGITS):
        U, V = (mpmath.qr(mpmath.matrix(Z.tolist()), mode="skinny")[0] for Z in (X, Y))
        G = U.T * V
        square = G.T * G if G.rows >= G.cols else G * G.T
        values = mpmath.eigsy(square, eigvals_only=True)
        return np.array(sorted(float(mpmath.acos(mpmath.sqrt(min(mpmath.mpf(1), abs(x))))) for x in values))


# Merging: W' = W + Σ w·ΔW, DoRA's m / ‖W + ΔW‖, one entry or vector after the other, float64.


def dora_weight(total, lengths, axis):
    """Every row (axis 0) or column (axis 1) of W + ΔW brought to its length; a zero vector stays zero."""
    found = np.zeros_like(total)
    for i in range(total.shape[axis]):
        vector = total[i] if axis == 0 else total[:, i]
        norm = math.sqrt(math.fsum(x * x for x in vector))
        scaled = vector * (lengths[i] / norm) if norm else 0 * vector
        if axis == 0:
            found[i] = scaled
        else:
            found[:, i] = scaled
    return found


def rounding_gain_and_errors(W, merged, D, V=None):
    """⟨W' − W, D⟩/‖D‖², ‖W' − W − D‖/‖D‖, share unmoved, and ‖(W' − W − D) V‖/‖D‖; float64, sums of Python."""
    moved = [float(m) - float(w) for m, w in zip(merged.ravel(), W.ravel(), strict=True)]
    D_D = math.fsum(float(d) ** 2 for d in D.ravel())
    gain = math.fsum(x * float(d) for x, d in zip(moved, D.ravel(), strict=True)) / D_D
    E = np.array(moved).reshape(D.shape) - D
    error = math.sqrt(math.fsum((E**2).ravel()) / D_D)
    inside = None if V is None else float(np.linalg.norm(E @ V) / math.sqrt(D_D))
    return gain, error, moved.count(0.0) / len(moved), inside


def feedback_rounding(t, V, rounded, damping=1e-3):
    """t (out, in) rounded input by input with the error fed back in V (in, r): the inverse of every S_j by itself."""
    q, E = np.zeros_like(t), np.zeros((len(t), V.shape[1]))
    for j in range(t.shape[1]):
        S = V[j:].T @ V[j:]
        g = np.linalg.solve(S + damping * np.eye(V.shape[1]), V[j])
        q[:, j] = rounded(t[:, j] - E @ g)
        E += np.outer(q[:, j] - t[:, j], V[j])
    return q


# Elementwise rules of combining, one entry after the other, float64; updates are already weighted.


def largest(D, density):
    """D with all but the ⌊density · size⌋ largest entries, and those equal to the last of them, set to 0."""
    ordered = sorted((abs(x) for x in D.ravel().tolist()), reverse=True)
    cutoff = ordered[max(1, int(density * D.size)) - 1]
    return np.where(np.abs(D) >= cutoff, D, 0.0)


def elected(updates, shares=None):
    """Of every entry the mean, weighted by shares, of the updates whose sign is that of the sum."""
    shares = [1.0] * len(updates) if shares is None else shares
    found = np.zeros_like(updates[0])
    for place in np.ndindex(found.shape):
        values = [float(D[place]) for D in updates]
        total = sum(values)
        agree = [(x, share) for x, share in zip(values, shares, strict=True) if x * total > 0]
        if agree:
            found[place] = sum(x * share for x, share in agree) / sum(share for _, share in agree)
    return found


def dense_ties(updates, density):
    return elected([largest(D, density) for D in updates])


def dense_magnitude(updates, density):
    return sum(largest(D, density) for D in updates)


def dense_breadcrumbs(updates, density, gamma):
    """Without the ⌊γ · size⌋ largest; of the others the ⌊density · size⌋ largest."""
    found = np.zeros_like(updates[0])
    for D in updates:
        order = sorted(np.ndindex(D.shape), key=lambda place: -abs(D[place]))
        first = int(gamma * D.size)
        for place in order[first : first + max(1, int(density * D.size))]:
            found[place] += D[place]
    return found


def dense_dare(updates, words, density, elect=False):
    """``words``: for each update whole numbers in [0, 2¹⁶) in its shape."""
    kept = round(density * 2**16)
    dropped = [np.where(drawn < kept, D * 2**16 / kept, 0.0) for D, drawn in zip(updates, words, strict=True)]
    return elected(dropped) if elect else sum(dropped)


def dense_della(updates, words, density, epsilon):
    pruned = []
    for D, drawn in zip(updates, words, strict=True):
        kept = np.zeros_like(D)
        for i in range(D.shape[0]):
            order = sorted(range(D.shape[1]), key=lambda j: abs(D[i, j]))
            for rank, j in enumerate(order):
                q = density + epsilon * (2 * rank / (D.shape[1] - 1) - 1)
                if drawn[i, j] < round(q * 2**16):
                    kept[i, j] = D[i, j] * 2**16 / round(q * 2**16)
        pruned.append(kept)
    return elected(pruned)


def dense_sce(updates, density):
    variance = np.var(np.array(updates), axis=0)
    chosen = largest(variance, density) > 0 if density < 1 else np.ones_like(variance)
    selected = [D * chosen for D in updates]
    energies = [math.fsum((D**2).ravel()) for D in selected]
    return elected(selected, [energy / sum(energies) for energy in energies])


def dense_knots(updates, rule):
    """The rule on S V_tᵀ of the SVD of [ΔW_1 … ΔW_T], and U back."""
    U, s, Vh = np.linalg.svd(np.hstack(updates), full_matrices=False)
    k = int(np.sum(s > 1e-10 * s[0]))
    parts = np.split(s[:k, None] * Vh[:k], len(updates), axis=1)
    return U[:, :k] @ rule(parts)


def dense_core(updates, rule):
    """The rule on U_Bᵀ ΔW_t V_A, of the singular vectors of the balanced factors side by side."""
    left, right = [], []
    for D in updates:
        U, s, Vh = np.linalg.svd(D, full_matrices=False)
        k = int(np.sum(s > 1e-10 * s[0]))
        left.append(U[:, :k] * np.sqrt(s[:k]))
        right.append(Vh[:k].T * np.sqrt(s[:k]))
    bases = []
    for side in (left, right):
        U, s, _ = np.linalg.svd(np.hstack(side), full_matrices=False)
        bases.append(U[:, s > 1e-10 * s[0]])
    return bases[0] @ rule([bases[0].T @ D @ bases[1] for D in updates]) @ bases[1].T


def best_of_rank(F, k):
    U, s, Vh = np.linalg.svd(F, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vh[:k]


# Noise edges (Gavish & Donoho 2014) by integrals, and what two dense checkpoints differ by.


def marchenko_pastur_middle(beta):
    """The t at which the integral of √((b−t)(t−a))/(2πβt) is one half, by bisection."""
    a, b = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2

    def below(x):
        return float(mpmath.quad(lambda t: mpmath.sqrt((b - t) * (t - a)) / (2 * mpmath.pi * beta * t), [a, x]))

    low, high = a, b
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < 0.5 else (low, middle)
    return (low + high) / 2


def best_threshold(beta):
    """λ(β) with x = λ: the fixed point at which keeping and dropping a direction cost the same, by bisection.

    A direction seen at y has strength x = √((y²−β−1+√((y²−β−1)²−4β))/2); keeping it costs x² + y² − 2 x y c c̃, and
    dropping it x² (eq. 5–7 of the paper).
    """

    def gain(y):
        z = y * y - beta - 1
        x = math.sqrt((z + math.sqrt(max(z * z - 4 * beta, 0.0))) / 2)
        c = math.sqrt((x**4 - beta) / (x**4 + beta * x * x))
        d = math.sqrt((x**4 - beta) / (x**4 + x * x))
        return y * y - 2 * x * y * c * d

    low, high = 1 + math.sqrt(beta) + 1e-9, 10.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0 else (low, middle)
    return low


# Combining adapters: updates as dense float64 matrices, strengths beside them; every method written out.


def dense_sum(updates, weights):
    return sum(w * D for w, D in zip(weights, updates, strict=True))


def dense_average(updates, weights):
    return dense_sum(updates, weights) / sum(weights)


def dense_slerp(updates, weights):
    (first, second), t = updates, weights[1] / (weights[0] + weights[1])
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    cosine = np.sum(first * second) / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * first + math.sin(t * angle) * second) / math.sin(angle)


def dense_karcher(updates, weights):
    """By plain descent of the sum of squared angles, with a small step."""
    norms = [np.linalg.norm(D) for D in updates]
    units = [D / n for D, n in zip(updates, norms, strict=True)]
    shares = [w / sum(weights) for w in weights]
    u = sum(a * x for a, x in zip(shares, units, strict=True))
    u /= np.linalg.norm(u)
    for _ in range(2000):
        tangent = np.zeros_like(u)
        for a, x in zip(shares, units, strict=True):
            angle = math.acos(min(1.0, max(-1.0, float(np.sum(u * x)))))
            if angle > 1e-12:
                tangent += a * angle / math.sin(angle) * (x - math.cos(angle) * u)
        u = u + 0.3 * tangent
        u /= np.linalg.norm(u)
    return sum(a * n for a, n in zip(shares, norms, strict=True)) * u


def dense_model_stock(updates, weights):
    x = [w * D for w, D in zip(weights, updates, strict=True)]
    count = len(x)
    units = [one / np.linalg.norm(one) for one in x]
    cosines = [np.sum(units[i] * units[j]) for i in range(count) for j in range(i)]
    c = max(0.0, np.mean(cosines)) if cosines else 1.0
    return count * c / (1 + (count - 1) * c) * sum(x) / count


def dense_equalised(updates, beta):
    norms = [np.linalg.norm(D) for D in updates]
    mean = np.mean(norms)
    return [(beta * n + (1 - beta) * mean) / n * D for n, D in zip(norms, updates, strict=True)]


def dense_equal_norms(updates, weights, beta=0.0):
    return dense_sum(dense_equalised(updates, beta), weights)


def dense_cart(updates, weights, rank, lam=1.0):
    x = [w * D for w, D in zip(weights, updates, strict=True)]
    mean = sum(x) / len(x)
    return mean + lam * sum(best_of_rank(one - mean, rank) for one in x)


def dense_polar(X):
    """X (XᵀX)^(-1/2) through the eigenvectors of XᵀX, null directions left out."""
    values, V = np.linalg.eigh(X.T @ X)
    keep = values > 1e-12 * values.max()
    return X @ (V[:, keep] / np.sqrt(values[keep])) @ V[:, keep].T


def dense_triplets(D):
    U, s, Vh = np.linalg.svd(D)
    k = int(np.sum(s > 1e-10 * s[0])) if s[0] else 0
    return U[:, :k], s[:k], Vh[:k].T


def dense_tsv_m(updates, weights):
    most = max(1, min(updates[0].shape) // len(updates))
    U, s, V = zip(*(tuple(x[..., :most] for x in dense_triplets(D)) for D in updates), strict=True)
    sigma = np.diag(np.concatenate([w * one for w, one in zip(weights, s, strict=True)]))
    return dense_polar(np.hstack(U)) @ sigma @ dense_polar(np.hstack(V)).T


def dense_iso_c(updates, weights):
    U, s, V = dense_triplets(dense_sum(updates, weights))
    return np.mean(s) * U @ V.T


def dense_iso_cts(updates, weights, common=0.8):
    x = [w * D for w, D in zip(weights, updates, strict=True)]
    r = min(sum(len(dense_triplets(one)[1]) for one in x), *x[0].shape)
    each = min(round((1 - common) * r / len(x)), r // len(x))
    k = r - each * len(x)
    U, s, V = dense_triplets(sum(x))
    Us, ss, Vs = [U[:, :k]], [s[:k]], [V[:, :k]]
    for one in x:
        rest = one - Us[0] @ Us[0].T @ one
        found = dense_triplets(rest)
        for parts, part in zip((Us, ss, Vs), found, strict=True):
            parts.append(part[..., :each])
    return np.mean(np.concatenate(ss)) * dense_polar(np.hstack(Us)) @ dense_polar(np.hstack(Vs)).T


def dense_ctm(updates, weights, rank, beta=0.25):
    scaled = dense_equalised(updates, beta)
    U = np.linalg.svd(np.hstack(scaled))[0][:, :rank]
    V = np.linalg.svd(np.hstack([D.T for D in scaled]))[0][:, :rank]
    for _ in range(300):
        U = np.linalg.svd(np.hstack([D @ V for D in scaled]))[0][:, :rank]
        V = np.linalg.svd(np.hstack([D.T @ U for D in scaled]))[0][:, :rank]
    return U @ sum(w * U.T @ D @ V for w, D in zip(weights, updates, strict=True)) @ V.T


def dense_null_space(updates, weights, mu=math.inf, rank=None):
    x = [w * D for w, D in zip(weights, updates, strict=True)]
    V = dense_triplets(x[0])[2][:, :rank]
    share = 1.0 if math.isinf(mu) else mu / (1 + mu)
    projector = np.eye(x[0].shape[1]) - share * V @ V.T
    return x[0] + sum((one @ projector for one in x[1:]), np.zeros_like(x[0]))


def dense_pico(updates, weights):
    """B of every update with orthonormal rows of A: ΔW V."""
    x = [w * D for w, D in zip(weights, updates, strict=True)]
    B = np.hstack([one @ dense_triplets(one)[2] for one in x])
    U, s, _ = np.linalg.svd(B, full_matrices=False)
    alpha = 1 / (1 + (len(x) - 1) * s**2 / np.sum(s**2))
    calibrated = sum((np.eye(len(U)) + U @ np.diag(alpha - 1) @ U.T) @ one for one in x)
    return np.mean([np.linalg.norm(one) for one in x]) / np.linalg.norm(calibrated) * calibrated


def dense_knots_sum(updates, weights):
    U, s, Vh = np.linalg.svd(np.hstack(updates), full_matrices=False)
    parts = np.split(np.diag(s) @ Vh, len(updates), axis=1)
    return U @ dense_sum(parts, weights)


def dense_quality(updates, weights, result):
    """Error to the sum, and of every update: retained energy, gain, interference in the sum and in the result."""
    total = dense_sum(updates, weights)
    U, _, V = dense_triplets(result)
    shares = []
    for w, D in zip(weights, updates, strict=True):
        energy = np.sum(D**2)
        retained = np.sum((U @ U.T @ D @ V @ V.T) ** 2) / energy
        gain, before = np.sum(result * D) / energy, np.sum(total * D) / energy
        shares.append((retained, gain, before - w, gain - w))
    return np.linalg.norm(result - total) / np.linalg.norm(total), shares


# Draws, where a test holds a closed form against chance itself.


def haar_corner(rng, n, shape, draws=()):
    """The overlap UᵀV of two uniform orthonormal bases of R^n, float64, of this shape; O(k³) whatever n is.

    With ``draws=(m,)`` it is m independent ones, shape (m, k1, k2).

    U may be taken as the first columns of 1, so this is the corner of a Haar matrix: a Gaussian block over the
    Cholesky factor of its Gram matrix plus that of the n − k1 rows below, which Bartlett's triangle gives.
    """
    k1, k2 = shape
    X = rng.standard_normal((*draws, k1, k2))
    rest = n - k1
    if rest >= k2:
        R = np.triu(rng.standard_normal((*draws, k2, k2)), 1)
        R[..., range(k2), range(k2)] = np.sqrt(rng.chisquare(rest - np.arange(k2), (*draws, k2)))
    else:
        R = rng.standard_normal((*draws, rest, k2))
    L = np.linalg.cholesky(X.swapaxes(-1, -2) @ X + R.swapaxes(-1, -2) @ R)
    return np.linalg.solve(L, X.swapaxes(-1, -2)).swapaxes(-1, -2)
