"""The plan of a truncation: the directions of all modules, from which any ranks and their trade-off can be made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import attrgetter
from typing import Any, Literal, final

import numpy as np

from loralens.compression.directions import (
    Directions,
    DType,
    Protection,
    bases_of,
    cast_factors,
    locate_errors,
    nearest_pair,
    protection,
    truncate_pair,
)
from loralens.compression.loss import (
    UpdateLoss,
    directions_on_data,
    equalise_units,
    loss_of,
    total_error,
)
from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import Bases, LowRank
from loralens.core.names import is_expert_alone
from loralens.core.ranks import Rule, RuleName, rank_items, ranks_from_items, shared_ranks
from loralens.core.selection import select
from loralens.core.stored import Moments
from loralens.core.structured import Structured, Update, product_dtype
from loralens.core.threads import Step, in_threads
from loralens.core.together import BOUND, NORMS, magnitudes
from loralens.core.weights import Weight
from loralens.errors import OptionError, ShapeError, place
from loralens.linalg.measures import numerical_rank


def solve_magnitudes(before: Adapter, after: Adapter, weights: Mapping[str, Weight]) -> Adapter:
    """``after`` with magnitudes that fit its directions, in every module that differs from that of ``before``.

    Parameters
    ----------
    before, after : Adapter
        Both have the same extra tensors.
    weights : mapping of str to Weight
        The base weight of every module that has a magnitude.

    Raises
    ------
    ShapeError
        A magnitude does not have one number for each output, or input channel.
    """
    extra = dict(after.extra)
    for name, key in magnitudes(after).items():
        # A module that keeps its rank and dtype is the same object: its magnitude stays, bit for bit.
        if after[name] is not before[name]:
            with place(key):
                extra[key] = _solve_magnitude(extra[key], before[name], after[name], weights[name])
    return replace(after, extra=extra)


def _solve_magnitude(extra: Extra, before: Update, after: Update, weight: Weight) -> Extra:
    over_in, kernel = extra.role in ("magnitude", "norms"), before.layout.kernel
    tensor = extra.tensor
    # LyCORIS stores a magnitude by input channel flat: the kernel is what is left of the width.
    if extra.role == "magnitude_in" and not kernel and before.shape[1] % max(1, tensor.size) == 0:
        kernel = (before.shape[1] // max(1, tensor.size),)
    cosines = weight_cosines(before, after, weight, over_in=over_in, kernel=kernel)
    if extra.role in NORMS:  # the file had no magnitudes, so programs used ‖W‖ for them; from now on it has some
        # PEFT stores the magnitudes of a convolution as (1, out, 1, 1).
        shape = (1, before.shape[0], *(1 for _ in kernel)) if kernel else (cosines.size,)
        tensor = LazyArray.of(weight.lengths(by_input=not over_in).astype(np.float32).reshape(shape))
        extra = Extra("magnitude" if over_in else "magnitude_in", extra.module, tensor)
    if tensor.size != cosines.size:
        what = f"{tensor.shape} is not one number for each of {cosines.size} channels"
        raise ShapeError(what, fix="save the adapter again")
    m = tensor.read().astype(np.float64) * cosines.reshape(tensor.shape)
    return replace(extra, tensor=LazyArray.of(m.astype(tensor.dtype)))


def weight_cosines(
    before: Update, after: Update, weight: Weight, *, over_in: bool = True, kernel: tuple[int, ...] = ()
) -> Array:
    """cos∠(V, V') of each row (``over_in``) or column of V = W + ΔW and V' = W + ΔW'.

    Returns
    -------
    float64 array, shape (out,), or (in channels,): columns of one input channel of a kernel count as one; 1 where a
    row is 0.
    """
    out, in_ = before.shape
    sums = np.zeros((3, out if over_in else in_))
    first, second = (_parts(module, in_side=weight.transposed) for module in (before, after))
    for part, block in weight.blocks():
        W = block.astype(np.float64).T if weight.transposed else block.astype(np.float64)
        V, V_ = W + first(part), W + second(part)
        products = [np.einsum("ij,ij->i" if over_in else "ij,ij->j", x, y) for x, y in ((V, V_), (V, V), (V_, V_))]
        if over_in == weight.transposed:  # each block holds a part of every row, so parts are added up
            sums += products
        else:
            sums[:, part] = products
    if not over_in and kernel:
        sums = sums.reshape(3, in_ // prod(kernel), prod(kernel)).sum(2)
    dot, square, square_ = sums
    length = np.sqrt(square) * np.sqrt(square_)  # the root of the product could overflow
    return np.asarray(np.divide(dot, length, out=np.ones_like(dot), where=length > 0))


def _parts(module: Update, *, in_side: bool) -> Callable[[slice], Array]:
    """A function from a slice to those rows of ΔW, or those columns. The factors are read once."""
    if not isinstance(module, LowRank):
        dense = module.dense()
        return lambda part: dense[:, part] if in_side else dense[part]
    scale, B, A = module.scale, module.B.astype(np.float64), module.A.astype(np.float64)
    return lambda part: scale * (B @ A[:, part] if in_side else B[part] @ A)


Size = Callable[[Adapter], int]
# Shapes and offsets in a header have more or fewer digits, which must not decide between two forms.
DIGITS = 64  # bytes by which the header entries of two forms of one module may differ


@final
@dataclass(frozen=True, slots=True)
class TruncationPlan:
    """An adapter, and the directions of the modules that may become smaller.

    Attributes
    ----------
    directions : mapping of str to Directions
        The directions of the chosen modules, in natural order; all other modules stay as they are.
    dtype : dtype or None
        The dtype of all factors that are written. None: each factor keeps its own, and factors that are products of
        other tensors, such as those of a LoHa, get the dtype of these tensors.
    """

    adapter: Adapter
    directions: Mapping[str, Directions]
    dtype: DType | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        *,
        modules: Sequence[str] = (),
        dtype: Any = None,
        moments: Moments | None = None,
        bases: bool = False,
        threads: int = 1,
        step: Step | None = None,
    ) -> "TruncationPlan":
        """Make the plan for these modules (all by default), in one pass over the factors.

        With ``moments``, the directions are ordered by their effect on the data that was measured. With ``bases`` the
        plan keeps what `bases` needs, which is two more r × r matrices a module. ``step`` is called with 1 after every
        module.

        Without moments, no update of the same rank is nearer in the Frobenius or spectral norm (Eckart & Young 1936).
        ΔW is never formed: the work is O((out + in)·r²) a module, and two r × r matrices a module are kept in memory.

        Raises
        ------
        OptionError
            A glob matches nothing.
        MismatchError
            The moments are those of another adapter.
        FormatError
            A module holds NaN or Inf. This includes modules that stay as they are: the error of the whole adapter
            would not be defined.
        """
        if moments is not None:
            moments.check(adapter)

        def find(name: str) -> Directions:
            with place(name):
                moment = moments[name] if moments is not None and name in moments else None
                return directions_on_data(adapter[name], moment, bases=bases)

        # One pass: of every module either the directions are found, or it is tested for NaN and Inf.
        names = [name for name in select(adapter, modules) if not keeps_rank(adapter[name])]
        by_module = in_threads(find, names, threads, step)
        _check_finite(adapter, [name for name in adapter if name not in by_module], threads, step)
        if moments is not None:
            by_module = equalise_units(by_module, adapter, moments)
        return cls(adapter, by_module, None if dtype is None else np.dtype(dtype))

    @classmethod
    def of_values(
        cls, adapter: Adapter, values: Mapping[str, Array], *, threads: int = 1, step: Step | None = None
    ) -> "TruncationPlan":
        """The plan of `of` without moments, for modules whose singular values are known.

        The factors of these modules are not read before a factor of `at` is. All other modules are only tested for NaN
        and Inf. ``step`` is called with the number of modules that are done since its last call.

        Parameters
        ----------
        values : mapping of str to float64 array
            Module name → all min(out, r, in) singular values of ΔW, as `LowRank.singular_values` returns them.

        Raises
        ------
        FormatError
            A module without known values holds NaN or Inf.
        """
        directions = {
            name: Directions(s[: numerical_rank(s, adapter[name].shape)])
            for name, s in values.items()
            if not keeps_rank(adapter[name])
        }
        if step:
            step(len(values))
        _check_finite(adapter, [name for name in adapter if name not in values], threads, step)
        return cls(adapter, directions)

    def ranks(
        self,
        rule: Rule,
        *,
        one_rank: bool = False,
        protect: Protection = "absolute",
        drop_dead: bool = False,
        size: Size | None = None,
    ) -> dict[str, int]:
        """The ranks that a rule gives to the modules of the plan.

        Parameters
        ----------
        rule : Rule
            A criterion for each module alone, or one budget for all modules. A budget of ``parameters`` up to 1 is a
            share of the parameters of the adapter. Modules outside the plan count in a budget too.
        one_rank : bool
            Whether all modules get the same rank; narrower ones are padded with zeros.
        protect : "absolute", "relative" or mapping of str to float
            What a budget minimises: Σ‖ΔW−ΔW'‖², the same relative to ‖ΔW‖² of each module, or the former with a weight
            for each glob (1 for modules that no glob matches).
        drop_dead : bool
            Leave out modules whose rank becomes 0: modules that do nothing, and modules for which the budget has no
            room. Otherwise every module keeps one direction. A module with a DoRA magnitude or a bias of its own always
            does.
        size : callable, optional
            Adapter → size of the file to be written, for the rule ``bytes``; by default the bytes of the factors count.

        Raises
        ------
        OptionError
            The budget is too small for rank 1 everywhere, a glob matches nothing, or no module is left.
        """
        chooser = self.chooser(
            rule.name, ceiling=rule.ceiling, one_rank=one_rank, protect=protect, drop_dead=drop_dead, size=size
        )
        return chooser(rule)

    def chooser(
        self,
        name: RuleName,
        *,
        ceiling: int | None = None,
        one_rank: bool = False,
        protect: Protection = "absolute",
        drop_dead: bool = False,
        size: Size | None = None,
    ) -> Callable[[Rule], dict[str, int]]:
        """A function from rules of this name to ranks: `ranks`, with all that does not depend on the value done once.

        Parameters and errors are those of `ranks`.
        """
        spectra = {name: one.s for name, one in self.directions.items()}
        nbytes: Size = size or attrgetter("nbytes")
        fused = [name for name in self.directions if is_fused_module(self.adapter[name])]

        def adjust(chosen: Mapping[str, int]) -> Mapping[str, int]:
            return self._restore_fused(chosen, fused, nbytes) if fused and not one_rank else chosen

        price = self.direction_bytes if name == "bytes" else lambda module: sum(module.shape)
        items = rank_items(
            spectra,
            {name: price(self.adapter[name]) for name in self.directions},
            shared=shared_ranks(self.adapter.modules),
            weights=protection(spectra, protect),
            least=self.least(drop_dead=drop_dead),
            one_rank=one_rank,
            widths={name: self.adapter[name].rank for name in self.directions},
            ceiling=ceiling,
        )
        # With a size of its own the adapter is made at these ranks, because sizes of a file depend on more than ranks.
        of_ranks = self.measure("nbytes" if name == "bytes" else "parameters")
        measure = (lambda chosen: size(self.at(chosen))) if size and name == "bytes" else of_ranks

        def choose(rule: Rule) -> dict[str, int]:
            # No module fits into one parameter or less, so such a number can mean a share instead.
            if rule.name == "parameters" and rule.value <= 1:
                rule = replace(rule, value=max(1, int(rule.value * self.adapter.parameters)))
            chosen = ranks_from_items(
                items,
                rule,
                spectra,
                one_rank=one_rank,
                size=lambda chosen: measure(adjust(chosen)) if self._any_left(chosen) else 0,
            )
            if not self._any_left(chosen):
                raise OptionError("no module is left: ΔW is 0 in all of them", fix="leave out --drop-dead")
            return dict(adjust(chosen))

        return choose

    def measure(self, quantity: Literal["parameters", "nbytes"]) -> Callable[[Mapping[str, int]], int]:
        """A function from the ranks of all modules of the plan to this quantity of `at` these ranks.

        It makes no adapter, which takes a hundred times as long.
        """
        fixed: int = sum(getattr(one, quantity) for name, one in self.at({}).items() if name not in self.directions)
        # What a module has at the rank at which it stays as it is, and what one direction of it has.
        whole: dict[tuple[str, int], int] = {}
        unit: dict[str, int] = {}
        for name in self.directions:
            module = self.adapter[name]
            unit[name] = self.direction_bytes(module) if quantity == "nbytes" else sum(module.shape)
            dtype = self.dtype_of(module)
            if isinstance(module, LowRank) and (dtype is None or cast_factors(module, dtype) is module):
                whole[name, module.rank] = getattr(module, quantity)
        return lambda chosen: fixed + sum(whole.get(one, one[1] * unit[one[0]]) for one in chosen.items())

    def _restore_fused(self, chosen: Mapping[str, int], fused: Sequence[str], size: Size) -> Mapping[str, int]:
        """``chosen``, with the old rank for those of the ``fused`` projections that would not become smaller.

        A fused projection is stored as blocks. A truncated one has no blocks, and may take more at a lower rank.
        """
        restored = {
            name: self.adapter[name].rank
            for name in fused
            if chosen[name] * sum(self.adapter[name].shape) >= self.adapter[name].parameters
        }
        if all(chosen[name] == rank for name, rank in restored.items()):
            return chosen
        whole_ranks = {**chosen, **restored}
        return whole_ranks if size(self.at(whole_ranks)) <= size(self.at(chosen)) + DIGITS * len(restored) else chosen

    def least(self, *, drop_dead: bool) -> dict[str, int]:
        """Module name → its smallest rank: 0 if it may be left out and no other tensor of the file depends on it."""
        bound = {extra.module for extra in self.adapter.extra.values() if extra.role in BOUND}
        return {name: int(not drop_dead or name in bound) for name in self.directions}

    def _any_left(self, chosen: Mapping[str, int]) -> bool:
        """Whether any module is left at these ranks."""
        return len(chosen) < len(self.adapter) or any(chosen.values())

    def direction_bytes(self, module: Update) -> int:
        """The bytes of one direction of a module in its file."""
        (out, in_), dtype = module.shape, self.dtype_of(module)
        if dtype or not isinstance(module, LowRank):
            return (out + in_) * (dtype.itemsize if dtype else 4)  # `nearest_pair` makes float32
        # Each factor keeps its own dtype, and in some files they differ.
        B, A = module.factors
        return out * B.dtype.itemsize + in_ * A.dtype.itemsize

    def dtype_of(self, module: Update) -> DType | None:
        """The dtype in which the factors of a module are written; None if each keeps its own."""
        return self.dtype or product_dtype(module)

    def at(self, chosen: Mapping[str, int]) -> Adapter:
        """The adapter at these ranks. Its factors are computed when they are read.

        A module that keeps its rank and dtype is the same object, with its stored bits. A module of rank 0 is left out.
        An update that is not a pair (LoKr, LoHa, full) becomes a pair.
        """
        recent = Recent()  # shared by all modules, so that one dense pair is in memory at a time
        # Modules that end with one rank and had one scale keep one α in common. PEFT joins experts that are modules of
        # their own, at one scale.
        kept = {(one.rank, one.scale) for name, one in self.adapter.items() if chosen.get(name, one.rank) == one.rank}
        modules: dict[str, Update] = {}
        for name, module in self.adapter.items():
            rank, dtype = chosen.get(name, module.rank), self.dtype_of(module)
            if isinstance(module, Structured):
                modules[name] = nearest_pair(module, rank, dtype, recent) if name in chosen else module
            elif rank == module.rank:
                modules[name] = cast_factors(module, dtype) if dtype else module
            else:
                whole = (rank, module.scale) not in kept and not is_expert_alone(name)
                modules[name] = truncate_pair(module, self.directions[name], rank, dtype, whole_alpha=whole)
            if modules[name] is not module:
                modules[name] = locate_errors(name, modules[name])
        return replace(self.adapter, modules=modules).without([name for name, rank in chosen.items() if rank == 0])

    def bases(self, name: str) -> Bases | None:
        """The bases of a module of the adapter, if the plan has them; the factors are read."""
        return bases_of(self.adapter[name], self.directions[name]) if name in self.directions else None

    def losses(self, chosen: Mapping[str, int]) -> dict[str, UpdateLoss]:
        """The errors of the chosen modules from the directions that are dropped, before rounding, in units of ``s``."""
        spectra = {name: self.directions[name].s for name in chosen}
        return {
            name: loss_of(self.adapter[name].rank, rank, spectra[name], spectra[name][rank:])
            for name, rank in chosen.items()
        }


def _check_finite(adapter: Adapter, names: Sequence[str], threads: int, step: Step | None) -> None:
    """Raise a FormatError if one of these modules holds NaN or Inf."""

    def check(name: str) -> None:
        with place(name):
            adapter[name].singular_values()

    in_threads(check, names, threads, step)


def keeps_rank(module: Update) -> bool:
    """Whether a module cannot be truncated: B of a grouped convolution is block-diagonal, and would not stay so."""
    return module.layout.kind == "conv" and module.layout.groups > 1


def is_fused_module(module: Update) -> bool:
    """Whether a module is stored as one block for each of several fused projections."""
    return module.layout.kind == "merged" and module.origin is not None


# The share of the energy that a recommended rank may lose. It is the square of the error, so the error is 10 %. This is
# a convention and not a promise about a task: `loralens behave` measures what a smaller adapter does to outputs.
LOSS = 0.01
EVERY = 16  # every rank up to this is on the curve; above it, four for each doubling: 16, 20, 24, 28, 32, 40 …


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The size and the error of one choice of ranks.

    Attributes
    ----------
    ranks : tuple of int
        The lowest and the highest rank.
    parameters, bytes : int
        Of the whole adapter; the bytes include the header of the file.
    error : float
        ‖ΔW−ΔW'‖/‖ΔW‖ over the modules of the plan, before rounding.
    """

    ranks: tuple[int, int]
    parameters: int
    bytes: int
    error: float


@final
@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of the curve: a uniform rank, and the best ranks of the same size."""

    rank: int
    uniform: Choice
    budget: Choice


def curve_ranks(most: int) -> list[int]:
    """The ranks of the curve from 1 to ``most``: all up to 16, then four for each doubling."""
    shown_ranks, rank = [], 1
    while rank < most:
        shown_ranks.append(rank)
        rank += 1 if rank < EVERY else 2 ** (rank.bit_length() - 3)  # a quarter of the power of 2 below
    return [*shown_ranks, most] if most else []


def rank_curve(
    plan: TruncationPlan,
    *,
    size: Size,
    one_rank: bool = False,
    protect: Protection = "absolute",
    step: Step | None = None,
) -> list[CurvePoint]:
    """The size and the error at every rank, with one rank for all modules and with the best ranks of the same size.

    Parameters
    ----------
    plan : TruncationPlan
    size : callable
        Adapter → bytes of its file.
    one_rank : bool
        Whether the file format has one rank for all modules. The best ranks are then no better than a uniform rank.
    protect : "absolute", "relative" or mapping of str to float
        What the budget protects, as in `TruncationPlan.ranks`.
    step : callable, optional
        Called with 1 after every point.

    Returns
    -------
    list of CurvePoint
        From the highest rank down to 1.

    Notes
    -----
    The budget of a point is the size of the factors at uniform rank. Its file is therefore no larger, except for a few
    digits in its header. If ``protect`` is "absolute", its error is at most that of the uniform rank.
    """
    most = max((plan.adapter[name].rank for name in plan.directions), default=0)
    uniform_ranks = plan.chooser("rank", one_rank=one_rank)
    best_ranks = plan.chooser("bytes", one_rank=one_rank, protect=protect)
    measure, nbytes = _choices(plan, lambda chosen: size(plan.at(chosen))), plan.measure("nbytes")
    points = []
    for rank in reversed(curve_ranks(most)):
        chosen = uniform_ranks(Rule("rank", rank))
        best = best_ranks(Rule("bytes", nbytes(chosen)))
        points.append(CurvePoint(rank, measure(chosen), measure(best)))
        if step:
            step(1)
    return points


def energy_choice(plan: TruncationPlan, *, size: Size, one_rank: bool = False) -> Choice:
    """The size and the error of the ranks of ``compress --energy 0.99``, a rank for each module."""
    chosen = plan.ranks(Rule("energy", 1 - LOSS), one_rank=one_rank)
    return _choices(plan, lambda ranks: size(plan.at(ranks)))(chosen)


def _choices(plan: TruncationPlan, size: Callable[[Mapping[str, int]], int]) -> Callable[[Mapping[str, int]], Choice]:
    """A function from ranks to their size and error. The error of a module at a rank is computed once."""
    parameters = plan.measure("parameters")
    errors: dict[tuple[str, int], UpdateLoss] = {}
    measured: dict[frozenset[tuple[str, int]], Choice] = {}  # the best ranks are often one rank for all

    def measure_choice(chosen: Mapping[str, int]) -> Choice:
        key = frozenset(chosen.items())
        if key not in measured:
            measured[key] = measure_new(chosen)
        return measured[key]

    def measure_new(chosen: Mapping[str, int]) -> Choice:
        new = {name: rank for name, rank in chosen.items() if (name, rank) not in errors}
        errors.update({(name, new[name]): loss for name, loss in plan.losses(new).items()})
        error = total_error({name: errors[name, rank] for name, rank in chosen.items()})
        ranks = [rank for rank in chosen.values() if rank]  # modules of rank 0 are left out
        return Choice((min(ranks, default=0), max(ranks, default=0)), parameters(chosen), size(chosen), error)

    return measure_choice


def recommended_point(points: Sequence[CurvePoint], *, budget: bool = False) -> CurvePoint | None:
    """The point of the lowest rank that loses at most `LOSS` of the energy; None if there is no point.

    With ``budget`` the loss is that of the best ranks in the same size, chosen module by module.
    """
    choices = ((point, point.budget if budget else point.uniform) for point in reversed(points))
    return next((point for point, choice in choices if choice.error**2 <= LOSS), None)
