"""Plan: an adapter and the directions of its modules, from which it can be made at any ranks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from loralens.compression.directions import Directions, DType, named, narrowed, paired, truncated
from loralens.compression.informed import directions_on_data, in_one_unit
from loralens.compression.loss import Loss, predicted
from loralens.compression.protection import Protection, protection
from loralens.core.adapter import Adapter
from loralens.core.carried import BOUND
from loralens.core.lazy import Recent
from loralens.core.lowrank import LowRank
from loralens.core.moments import Moments
from loralens.core.names import select
from loralens.core.ranks import Rule, ranks, shared_ranks
from loralens.core.structured import Structured, Update
from loralens.core.threads import Step, in_threads
from loralens.errors import OptionError, place

Size = Callable[[Adapter], int]
DIGITS = 64  # bytes by which what a header says of two forms of one module may differ


@final
@dataclass(frozen=True, slots=True)
class Plan:
    """An adapter and the directions of the modules that may become smaller.

    Attributes
    ----------
    adapter : Adapter
    found : mapping of str to Directions
        Of the modules chosen, in natural order; the others stay as they are.
    dtype : dtype or None
        Of all factors that are written; None: each keeps its own.
    """

    adapter: Adapter
    found: Mapping[str, Directions]
    dtype: DType | None = None

    @classmethod
    def of(
        cls,
        adapter: Adapter,
        *,
        modules: Sequence[str] = (),
        dtype: Any = None,
        moments: Moments | None = None,
        threads: int = 1,
        step: Step | None = None,
    ) -> "Plan":
        """The plan for these modules (all by default): one pass over the factors.

        With ``moments``, directions are those that matter on the data they were measured on. ``step`` is called with 1
        after every module.

        Raises
        ------
        MismatchError
            The moments are those of another adapter.
        FormatError
            A module holds NaN or Inf, one that stays as it is too: no error of the whole could be told.
        """
        if moments is not None:
            moments.check(adapter)

        def find(name: str) -> Directions:
            with place(name):
                moment = moments[name] if moments is not None and name in moments else None
                return directions_on_data(adapter[name], moment)

        def check(name: str) -> None:
            with place(name):
                adapter[name].singular_values()

        names = [name for name in select(adapter, modules) if not kept_whole(adapter[name])]
        by_module = in_threads(find, names, threads, step)
        in_threads(check, [name for name in adapter if name not in by_module], threads, step)
        if moments is not None:
            by_module = in_one_unit(by_module, adapter, moments)
        return cls(adapter, by_module, None if dtype is None else np.dtype(dtype))

    def ranks(
        self,
        rule: Rule,
        *,
        one_rank: bool = False,
        protect: Protection = "absolute",
        drop_dead: bool = False,
        size: Size | None = None,
        cost: Callable[[Update], int] | None = None,
    ) -> dict[str, int]:
        """The ranks that a rule gives to the modules of the plan; see `loralens.compression.truncate.truncate`.

        ``cost`` says what one direction of a module takes of a ``size`` that is not the factors' own.
        """
        spectra, nbytes = {name: one.s for name, one in self.found.items()}, size or _nbytes
        measure = nbytes if rule.name == "bytes" else _parameters

        def spared(chosen: Mapping[str, int]) -> Mapping[str, int]:
            return chosen if one_rank else self._spared(chosen, nbytes)

        price = (cost or self.direction_bytes) if rule.name == "bytes" else _numbers
        if rule.name == "parameters" and rule.value <= 1:
            rule = Rule("parameters", max(1, int(rule.value * self.adapter.parameters)))
        chosen = ranks(
            spectra,
            {name: price(self.adapter[name]) for name in self.found},
            rule,
            shared=shared_ranks(self.adapter.modules),
            weights=protection(spectra, protect),
            least=self.least(drop_dead=drop_dead),
            one_rank=one_rank,
            widths={name: self.adapter[name].rank for name in self.found},
            size=lambda chosen: measure(self.at(spared(chosen))) if self._some(chosen) else 0,
        )
        if not self._some(chosen):
            raise OptionError("no module is left: none does anything", fix="leave out --drop-dead")
        return dict(spared(chosen))

    def _spared(self, chosen: Mapping[str, int], size: Size) -> Mapping[str, int]:
        """``chosen``, but fused projections whole where fewer directions, no longer in blocks, would be no smaller."""
        restored = {
            name: self.adapter[name].rank
            for name, rank in chosen.items()
            if fused(self.adapter[name]) and rank * sum(self.adapter[name].shape) >= self.adapter[name].parameters
        }
        if all(chosen[name] == rank for name, rank in restored.items()):
            return chosen
        spared = {**chosen, **restored}
        return spared if size(self.at(spared)) <= size(self.at(chosen)) + DIGITS * len(restored) else chosen

    def least(self, *, drop_dead: bool) -> dict[str, int]:
        """Module name → the fewest directions it may have: 0 only where it may go, and nothing else hangs on it."""
        bound = {extra.module for extra in self.adapter.extra.values() if extra.role in BOUND}
        return {name: int(not drop_dead or name in bound) for name in self.found}

    def _some(self, chosen: Mapping[str, int]) -> bool:
        """Whether these ranks leave any module at all."""
        return len(chosen) < len(self.adapter) or any(chosen.values())

    def direction_bytes(self, module: Update) -> int:
        """Bytes of one direction of a module in its file."""
        out, in_ = module.shape
        if self.dtype or not isinstance(module, LowRank):
            return (out + in_) * (self.dtype.itemsize if self.dtype else 4)
        B, A = module.factors
        return out * B.dtype.itemsize + in_ * A.dtype.itemsize

    def at(self, chosen: Mapping[str, int]) -> Adapter:
        """The adapter at these ranks, nothing computed yet: factors are made when they are read.

        A module that keeps its rank and dtype is the same module; one of rank 0 is gone.
        """
        recent, gone = Recent(), []
        modules: dict[str, Update] = {}
        for name, module in self.adapter.items():
            rank = chosen.get(name, module.rank)
            if isinstance(module, Structured):
                modules[name] = paired(module, rank, self.dtype, recent) if name in chosen else module
            elif rank == module.rank:
                modules[name] = narrowed(module, self.dtype) if self.dtype else module
            else:
                modules[name] = truncated(module, self.found[name].head(rank), self.dtype)
            if modules[name] is not module:
                modules[name] = named(name, modules[name])
            if rank == 0:
                gone.append(name)
        return replace(self.adapter, modules=modules).without(gone)

    def losses(self, chosen: Mapping[str, int]) -> dict[str, Loss]:
        """What the chosen modules lose by the directions that go, before any rounding, in the units of ``s``."""
        return {name: predicted(self.found[name].s, rank, self.adapter[name].rank) for name, rank in chosen.items()}


def kept_whole(module: Update) -> bool:
    """Whether a module has no smaller form: B of a grouped convolution is block-diagonal, and would not stay so."""
    return module.layout.kind == "conv" and module.layout.groups > 1


def fused(module: Update) -> bool:
    """Whether a module is stored as one block for each of several fused projections."""
    return module.layout.kind == "merged" and module.origin is not None


def _numbers(module: Update) -> int:
    """Parameters of one direction."""
    return sum(module.shape)


def _parameters(adapter: Adapter) -> int:
    return adapter.parameters


def _nbytes(adapter: Adapter) -> int:
    return adapter.nbytes
