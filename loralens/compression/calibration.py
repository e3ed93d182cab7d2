"""Calibration: the moments of an adapter's bottlenecks z = A x, measured by running a model on real inputs."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.attached import Attachment, Steps, Tree, call, first_input, frozen_evaluation, steps
from loralens.core.fingerprint import fingerprint
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.stored import Moment, Moments
from loralens.core.structured import Update
from loralens.errors import FormatError, MismatchError, OptionError, ShapeError, place
from loralens.linalg.factor import Basis, implicit, measure
from loralens.linalg.measures import EPS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from loralens.core.attached import Watch

    Loss = Callable[[Any, Any], Tensor]


SAME = 1e-2  # relative distance of PEFT's factor from ours: bfloat16 rounding stays below it, another adapter does not


def measure_moments(
    model: "nn.Module",
    batches: Iterable[Any],
    *,
    adapter: Adapter,
    out_side: bool = False,
    loss: "Loss | None" = None,
    source: Mapping[str, Any] | None = None,
) -> Moments:
    """Measure what the inputs in ``batches`` excite in every module of an adapter.

    K = E[z zᵀ], z = A x, where x are the inputs of a module **in the adapted model**: the adapter is on, so what the
    deeper modules see is what they will see in use.

    Parameters
    ----------
    model : nn.Module
        Either a ``peft.PeftModel`` that carries the adapter, unmerged and active, which is run as it is; or the base
        model, of transformers or plain torch, to which hooks add the update of the adapter. The model is run in
        evaluation mode, so without dropout, and is set back afterwards. Any float dtype, on any device.
    batches : iterable
        The model's inputs: mappings are passed as keyword arguments, tuples as positional arguments, and anything else
        as the only argument. With an ``attention_mask`` (batch, length), positions of 0 are not counted in modules
        whose inputs come as (batch, length, …) or as batch · length rows.
    adapter : Adapter
        The adapter whose modules are measured.
    out_side : bool
        Also measure G = E[(Bᵀg)(Bᵀg)ᵀ], where g is the gradient of the loss at the output of the module. This takes a
        backward pass for every batch.
    loss : callable, optional
        (output of the model, batch) → the scalar to differentiate; by default the ``.loss`` of the output. It should be
        a sum over positions, so that every position has the same weight in batches of any size.
    source : mapping, optional
        A description of the data, which is stored in the result with the number of ``batches``.

    Returns
    -------
    Moments
        Modules that no input reached have the count 0 and are listed in ``unreached``. Modules that cannot be measured
        are in ``unmeasured`` with the reason: they are not pairs, or have no layer of their own (expert stacks, fused
        attention, grouped convolutions). Their updates are applied nevertheless.

    Raises
    ------
    MismatchError
        The adapter does not fit the model, or the PEFT model does not contain this adapter.
    OptionError
        There are no batches, or ``out_side`` is set and there is no loss.

    Notes
    -----
    z and ‖x‖² are computed in float32 and summed in float64. Besides the forward pass this takes r² numbers a module,
    and nothing of the size of a weight.
    """
    sums, count = _Sums(out_side=out_side), 0
    # Without dropout, because the moments are those of the model in use.
    with frozen_evaluation(model, gradient=out_side), _watch_modules(model, adapter, sums.watch) as hooked:
        for batch in batches:
            count += 1
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            sums.mask = None if mask is None or mask.ndim != 2 else mask.bool()  # a 4-D mask does not list positions
            output = call(model, batch)
            if not out_side:
                continue
            value = loss(output, batch) if loss else getattr(output, "loss", None)
            if value is None:
                what = "the model returned no loss, and the out side needs one"
                raise OptionError(what, fix="put labels into the batches, or pass loss=")
            value.backward()
    if not count:
        raise OptionError("there are no batches to calibrate on", fix="give at least one input")
    return Moments(
        modules=sums.moments({name: adapter[name].rank for name in hooked}),
        fingerprint=fingerprint(adapter),
        unmeasured={name: _reason(module) for name, module in adapter.items() if name not in hooked},
        source={"batches": count, **(source or {})},
    )


@final
class _Sums:
    """Σ z zᵀ, Σ (Bᵀg)(Bᵀg)ᵀ, Σ ‖x‖² and how many z, for every hooked module, in float64."""

    def __init__(self, *, out_side: bool) -> None:
        self.out_side = out_side
        self.mask: Tensor | None = None  # True at the positions of this batch that count
        self._in: dict[str, Tensor] = {}
        self._out: dict[str, Tensor] = {}
        self._squares: dict[str, float] = {}
        self._counts: Counter[str] = Counter()

    def watch(self, name: str, factor_steps: Steps, x: "Tensor", z: "Tensor", output: "Tensor") -> "Tensor":
        """Add one call of a module, and register a hook for the gradient at its output."""
        # The trace of E[x xᵀ] needs one number for each position, and no matrix of the size of a weight.
        rows, squares = self._rows(z.detach()), self._rows(factor_steps.squares(x.detach())[..., None])
        self._in[name] = self._in.get(name, 0) + rows.T @ rows
        self._squares[name] = self._squares.get(name, 0.0) + float(squares.sum())
        self._counts[name] += len(rows)
        if not self.out_side:
            return output

        def add_gradient(g: "Tensor") -> None:
            rows = self._rows(factor_steps.back(g.detach()))
            self._out[name] = self._out.get(name, 0) + rows.T @ rows

        leaf = not output.requires_grad
        output.requires_grad_().register_hook(add_gradient)  # type: ignore[no-untyped-call]
        # Later layers may write into the output in place, which torch forbids for a leaf.
        return output.clone() if leaf else output

    def _rows(self, z: "Tensor") -> "Tensor":
        """The rows of z at the positions that count, float64, shape (count, r)."""
        if z.device.type == "mps":  # Apple's backend has no float64
            z = z.cpu()
        # Some models flatten (batch, length) before a module; a module that sees other positions is counted whole.
        rows, mask = z.reshape(-1, z.shape[-1]), self.mask
        if mask is not None and (z.shape[:-1] == mask.shape or z.shape[:-1] == (mask.numel(),)):
            rows = rows[mask.reshape(-1).to(z.device)]
        return rows.double()

    def moments(self, ranks: Mapping[str, int]) -> dict[str, Moment]:
        """The means, for modules of these ranks."""
        moments = {}
        for name, rank in ranks.items():
            count = self._counts[name]
            # A module that no input reached has moments of 0, and one whose output has no effect on the loss a G of 0.
            K, G = (
                sums[name].cpu().numpy() / count if count and name in sums else np.zeros((rank, rank))
                for sums in (self._in, self._out)
            )
            trace = self._squares[name] / count if count else 0.0
            moments[name] = Moment(K, count, G if self.out_side else None, trace=trace)
        return moments


@contextmanager
def _watch_modules(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """Run the block with the adapter applied and its modules watched; yields the names of the watched modules."""
    if hasattr(model, "peft_config"):
        with _watch_peft(model, adapter, watch) as hooked:
            yield hooked
        return
    attachment = Attachment(model, adapter)
    with attachment.on(watch):
        yield attachment.hooked


@contextmanager
def _watch_peft(model: "nn.Module", adapter: Adapter, watch: "Watch") -> Iterator[tuple[str, ...]]:
    """Watch the layers of a PEFT model, which applies the adapter itself; yields the names of the watched modules."""
    tree = Tree.of(model)
    weights = tree.weights(adapter).modules
    with ExitStack() as stack:
        hooked = []
        for name, module in adapter.items():
            key = weights[name].key
            # PEFT's layers wrap the layer that they adapt; what it applies elsewhere, such as to parameters, has none.
            layer = tree.layers[key.removesuffix(".weight")] if key.endswith(".weight") else None
            inner = getattr(layer, "base_layer", None)
            if layer is None or not isinstance(module, LowRank):
                continue
            with place(name):
                _check_carried(layer, module)
            factor_steps = steps(module, inner) if inner is not None else None
            if factor_steps is None:
                continue
            stack.callback(layer.register_forward_hook(_hook(name, factor_steps, watch), with_kwargs=True).remove)
            hooked.append(name)
        yield tuple(hooked)


def _hook(name: str, factor_steps: Steps, watch: "Watch") -> Callable[..., Any]:
    """A forward hook that shows the input, z and the output of a layer to ``watch``."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        x = first_input(args, kwargs)
        return watch(name, factor_steps, x, factor_steps.inside(x), output)

    return hook


def _check_carried(layer: Any, module: LowRank) -> None:
    """Raise a MismatchError if a PEFT layer does not carry this pair, or does not use it."""
    if getattr(layer, "disable_adapters", False) or getattr(layer, "merged", False):
        raise MismatchError("PEFT has this layer merged or switched off", fix="unmerge the model and enable adapters")
    # B is compared with its scale: the same factors under another α are another adapter.
    A, B = module.A.astype(np.float64), module.scale * module.B.astype(np.float64)
    # PEFT adds up all active adapters; this one has to be among them, under whatever name it was loaded.
    for name in getattr(layer, "active_adapters", ()):
        scale = getattr(layer, "scaling", {}).get(name, 1.0)
        if _near(_peft_factor(layer, "A", name), A) and _near(scale * _peft_factor(layer, "B", name), B):
            return
    raise MismatchError(
        "the PEFT model does not contain this adapter", fix="load this adapter into it, and activate it"
    )


def _peft_factor(layer: Any, side: str, name: str) -> Array:
    """The entries of PEFT's factor, float64, flat; empty if the layer has no such pair."""
    # PEFT keeps the factors of embeddings apart, as bare parameters without a layer around them.
    for factors in (getattr(layer, f"lora_{side}", {}), getattr(layer, f"lora_embedding_{side}", {})):
        if name in factors:
            own = getattr(factors[name], "weight", factors[name])
            return np.asarray(own.detach().double().cpu().numpy().reshape(-1))
    return np.empty(0)


def _near(stored: Array, expected: Array) -> bool:
    if stored.size != expected.size:
        return False
    return bool(np.linalg.norm(stored - expected.ravel()) <= SAME * np.linalg.norm(expected))


def _reason(module: Update) -> str:
    """The reason why a module could not be measured, for the user."""
    if not isinstance(module, LowRank):
        return f"a {module.form.name} has no A"
    return "its weight does not belong to a linear layer, an embedding or an ungrouped convolution that is called"


# Both losses are sums over positions, so that all positions weigh the same in batches of any size.
def next_token_loss(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(next token) of a causal language model, over neighbours that are both in the attention mask."""
    from torch.nn.functional import cross_entropy

    logits, ids, mask = output.logits[:, :-1], batch["input_ids"][:, 1:], batch["attention_mask"].bool()
    # A token after padding has nothing to be predicted from.
    both = (mask[:, 1:] & mask[:, :-1]).to(logits.device)
    return cross_entropy(logits[both].float(), ids.to(logits.device)[both], reduction="sum")


def label_loss(output: Any, batch: Any) -> "Tensor":
    """Σ −ln p(label) of a classifier; the batch has ``labels``."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(output.logits.float(), batch["labels"].to(output.logits.device), reduction="sum")


# It adds at most 1e-6 · E‖ΔW x‖² to the squared error on the data. It is far above rounding (1e-16), so it orders the
# directions that the data never excites.
SHARE = 1e-6  # energy of white inputs that is mixed in, relative to the energy on the data


@final
@dataclass(frozen=True)
class Whitened:
    """The update of a module as a sum of rank-one terms, ordered by their effect on the data; made by `whitened_svd`.

    ΔW = Q_B (X Y) A, and the best ΔW' of rank k on the data keeps the first k columns of X and rows of Y.

    Attributes
    ----------
    s : float64 array, shape (m,)
        Singular values of the whitened update, largest first: √Σ_{i>k} s_i² is the error at rank k in the norm that
        was minimised, in units of y = W x (with G: of the loss). A budget over modules compares these. m = min(out, r)
        if B has no zero columns.
    X : float64 array, shape (m, m)
    Y : float64 array, shape (m, r)
    Q_B : Basis
        m columns of length out.
    R_A : float64 array, shape (n, r)
        A = R_Aᵀ Q_Aᵀ, so Y_i R_Aᵀ has the length of the row Y_i A. n = min(r, in) if A has no zero rows.
    """

    s: Array
    X: Array
    Y: Array
    Q_B: Basis
    R_A: Array


def whitened_svd(module: LowRank, K: Array, G: Array | None = None) -> Whitened:
    """The directions of a module, ordered by their effect on real inputs.

    Parameters
    ----------
    module : LowRank, (out, in) of rank r
    K : array, shape (r, r)
        E[z zᵀ], z = A x: `loralens.core.stored.Moment.K`.
    G : array, shape (r, r), optional
        E[(Bᵀg)(Bᵀg)ᵀ], g the gradient at the output. Then ‖G^½(ΔW − ΔW')C^½‖_F is minimised, the error of the loss
        under K-FAC's factorisation, and the error on the data alone is no longer the smallest possible.

    Returns
    -------
    Whitened

    Raises
    ------
    ShapeError
        K or G is not (r, r).
    FormatError
        K, G or a factor holds NaN or Inf.

    Notes
    -----
    One-sided: SVD(s R_B [K^½, √ε R_Aᵀ]) = U s V, X = U, Y = s Uᵀ R_B. Two-sided: with FᵀF = G + η R_BᵀR_B,
    SVD(F [K^½, √ε R_Aᵀ]) = u s v, X = s R_B F⁺ u, Y = uᵀ F, F⁺ on the numerical range of F, which is that of B.
    η = 1e-6 of the ratio of the two energies, for the reason that ε has. SVD-LLM (one-sided, with a Cholesky
    factor of C) and K-FAC-weighted SVD give the same ΔW' from matrices of the size of W.

    O((out + in) r²) work.
    """
    K = _moment(K, module.rank, "K")
    Q_B, R_B = _basis_and_R(module.B)
    R_A = _basis_and_R(module.A.T)[1]
    core = module.scale * R_B  # (m, r); Q_B is orthonormal, so that all norms can be taken without it
    sides = _root(K), R_A.T
    L = _join_sides(sides, _white_share(core @ sides[0], core @ sides[1]))  # L Lᵀ = K + ε A Aᵀ
    if G is None:
        U, s, _ = np.linalg.svd(core @ L, full_matrices=False)
        return Whitened(s, U, U.T @ core, Q_B, R_A)
    G_root = _root(_moment(G, module.rank, "G")).T
    eta = _white_share(G_root @ L, R_B @ L)
    # Any square root of G + η R_BᵀR_B serves; a QR decomposition gives one without forming the sum.
    F = np.asarray(np.linalg.qr(_join_sides((G_root.T, R_B.T), eta).T, mode="r"))
    u, s, _ = np.linalg.svd(F @ L, full_matrices=False)
    m = Q_B.k  # the rank of B, beyond which F L has no singular values but rounding
    s = abs(module.scale) * s[:m]
    F_inverse = np.linalg.pinv(F, rcond=max(F.shape) * EPS)  # on the numerical range of F
    return Whitened(s, (core @ F_inverse) @ u[:, :m], u[:, :m].T @ F, Q_B, R_A)


def data_norm(module: LowRank, K: Array) -> float:
    """√(E‖ΔW x‖²), the size of an update at the output of its module. Raises the errors of `whitened_svd`."""
    root = _root(_moment(K, module.rank, "K"))
    return float(np.linalg.norm(module.scale * _basis_and_R(module.B)[1] @ root))


def data_error(module: LowRank, other: LowRank, K: Array, *, trace: float | None = None) -> float:
    """Relative error √(E‖(ΔW − ΔW')x‖² / E‖ΔW x‖²) of any update ``other`` of the same weight; 0 if both are 0.

    K describes the inputs only as A sees them. This is exact as far as the rows of A' are combinations of the rows of
    A, which holds for every truncation. Rounding adds a part outside the row space of A. For that part the energy of x
    that A does not see is assumed to be spread evenly over the remaining in − n directions, which is exact on average
    for white rounding noise. It needs ``trace``, E‖x‖² (`loralens.core.stored.Moment.trace`), and is left out without
    it. The result is infinite where ΔW x = 0 and ΔW' x is not. Raises the errors of `whitened_svd`, and a ShapeError if
    the two updates have different shapes.
    """
    if module.shape != other.shape:
        raise ShapeError(
            f"updates of the shapes {module.shape} and {other.shape} are not of one weight",
            fix="pass updates of equal shape",
        )
    root = _root(_moment(K, module.rank, "K"))
    right, R_A = _basis_and_R(module.A.T)
    Q_A, rows = right.columns(), other.A.T.astype(np.float64)
    inside = Q_A.T @ rows  # (n, r')
    through = np.linalg.lstsq(R_A, inside, rcond=None)[0].T  # A' = through · A + a part outside the row space of A
    # The difference is formed in the r + r′ directions of both B, so that nearly equal updates do not cancel.
    stacked = np.hstack([module.scale * module.B.astype(np.float64), -other.scale * other.B.astype(np.float64)])
    R = _basis_and_R(stacked)[1]
    first = R[:, : module.rank] @ root
    error, norm = np.linalg.norm(first + R[:, module.rank :] @ through @ root), np.linalg.norm(first)
    if trace is not None and Q_A.shape[0] > right.k:
        visible = float(np.sum(np.linalg.lstsq(R_A.T, root, rcond=None)[0] ** 2))  # E‖Q_Aᵀ x‖²
        spread = max(0.0, trace - visible) / (Q_A.shape[0] - right.k)
        error = np.hypot(error, np.sqrt(spread) * np.linalg.norm((rows - Q_A @ inside) @ R[:, module.rank :].T))
    return float(error / norm) if norm else (np.inf if error else 0.0)


def _moment(K: Array, rank: int, name: str) -> Array:
    """The moment in float64, made exactly symmetric, which `eigh` assumes."""
    K = np.asarray(K, np.float64)
    if K.shape != (rank, rank):
        raise ShapeError(
            f"{name} has the shape {K.shape}, and the module has rank {rank}",
            fix="measure them again with this one: loralens calibrate",
        )
    if not np.isfinite(K).all():
        raise FormatError(
            f"{name} holds NaN or Inf", fix="calibrate again, with inputs for which the model gives finite numbers"
        )
    return (K + K.T) / 2


def _root(K: Array) -> Array:
    """L with L Lᵀ = K, shape (r, r).

    Eigenvalues within rounding of 0 become 0, because the root of a rounding error of 1e-16 would count as 1e-8.
    """
    values, V = np.linalg.eigh(K)
    # `eigh` sorts upwards, so the last eigenvalue is the largest.
    alive = values > values[-1:] * len(K) * EPS
    return V * np.sqrt(np.where(alive, values, 0.0))


def _basis_and_R(X: Array) -> tuple[Basis, Array]:
    """Q and R with X = Q R, where Q is a basis of at most min(m, r) columns and R has all r columns."""
    factor = measure(X)
    order = np.flatnonzero(factor.norms)  # columns of 0 have no direction, and get columns of 0 in R
    Y, T, R = implicit(factor, order)
    full = np.zeros((R.shape[0], X.shape[1]))
    full[:, order] = R * np.ldexp(factor.norms, factor.exponents)[order]
    return Basis(Y, T), full


def _white_share(data: Array, weight: Array) -> float:
    """The factor ε of white inputs; 1 if the data has no energy, so that the result is plain truncation."""
    energy, weight_energy = float(np.sum(data**2)), float(np.sum(weight**2))
    return SHARE * energy / weight_energy if energy and weight_energy else 1.0


def _join_sides(sides: tuple[Array, Array], share: float) -> Array:
    """[first, √share · second]."""
    return np.hstack([sides[0], np.sqrt(share) * sides[1]])
