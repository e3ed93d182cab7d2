"""Extract: an adapter from two checkpoints, tuned − base, for a full fine-tune or what another tool merged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, NoReturn, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.names import natural_key, select
from loralens.core.ranks import Rule, ranks, shared_ranks
from loralens.core.scaling import Scaling
from loralens.core.threads import in_threads
from loralens.errors import OptionError, place
from loralens.merging.extraction.differences import Comparison, Difference, Tensors, compare, is_embedding
from loralens.merging.extraction.extraction import Extracted, Extraction, Frame
from loralens.merging.extraction.leftover import LeftOut, leftover
from loralens.merging.extraction.triplets import START, NoiseEdge, Triplets, measured_error, triplets
from loralens.merging.tying import Tied

BIG = 1 << 24  # numbers of a matrix from which it is worked on alone, all threads in its products

Size = Callable[[Adapter], int]
Step = Callable[[int], None]


def extract_adapter(
    base: Tensors,
    tuned: Tensors,
    rule: Rule | NoiseEdge,
    *,
    base_config: Mapping[str, Any] | None = None,
    tuned_config: Mapping[str, Any] | None = None,
    base_model: str | None = None,
    modules: Sequence[str] = (),
    one_rank: bool = False,
    conv1d: bool = False,
    exact: bool = False,
    dtype: Any = np.float32,
    drop_extra: bool = False,
    size: Size | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> Extraction:
    """The adapter that is nearest to tuned − base at the ranks that ``rule`` gives.

    Parameters
    ----------
    base, tuned : mapping of str to LazyArray
        Of any float dtypes. The base is taken as it is, the tuned one as base + ΔW rounded once.
    rule : Rule or NoiseEdge
        As in compressing; or what stands above the noise.
    base_config, tuned_config : mapping or None
        ``config.json`` of both: whether head and embedding are one, how experts are stored.
    base_model : str or None
        What the adapter says it belongs to.
    modules : sequence of str
        Globs over module names or kinds; by default every matrix but embeddings.
    one_rank : bool
        The same rank for all modules, which some servers want.
    conv1d : bool
        Linear weights are stored (in, out).
    exact : bool
        Dense SVDs in float64: minutes for a matrix of 4096 × 4096. Small ones are dense anyway.
    dtype : dtype
        Of the factors.
    drop_extra : bool
        Leave out what is no matrix: norms, biases, heads of its own.
    size : callable, optional
        Adapter → bytes of its file, for a rule in bytes; else the bytes of the factors count.
    threads : int
        More than one pays only where BLAS itself uses one.
    step : callable, optional
        Told the numbers of each matrix when it is done.

    Raises
    ------
    OptionError
        No matrix differs, or none rises above the noise; a budget too small; a glob that matches nothing.
    FormatError
        NaN or infinity in a difference.

    Notes
    -----
    Eckart & Young 1936. Memory: a few times the largest matrix in float32 (float64 where the SVD is dense), times the
    threads for matrices below 16 million numbers, and the triplets that are kept. Weights that differ are read
    three times: to see that they do, for their directions, and for the error of what was made.
    """
    base, tuned, tied = _untied(base, base_config, tuned, tuned_config)
    compared = compare(base, tuned, conv1d=conv1d, hidden=_hidden(tuned_config or {}))
    if not compared.matrices:
        raise OptionError("the two checkpoints share no weight matrix", fix="give two checkpoints of one model")
    if isinstance(rule, Rule) and rule.name == "parameters" and rule.value <= 1:
        raise OptionError("parameters as a share of nothing", fix="give a count, or --size")
    work = _Work(compared, rule, _chosen(compared, modules), one_rank, exact, np.dtype(dtype), threads, step)
    found, skipped = work.look()
    made = leftover(compared, found, drop=drop_extra)
    ranked = work.ranks(found, size or _nbytes, Frame(made, base_model, conv1d, tied))
    kept = {name: rank for name, rank in ranked.items() if rank}
    noise = [LeftOut(name, "nothing rises above the noise", found[name].norm) for name in ranked if name not in kept]
    skipped += [one for one in noise if one.norm]
    if not kept:
        count = len(skipped)
        what = f"{count} matrices differ and none is taken: {skipped[0].why}" if count else "no matrix differs"
        raise OptionError(what, fix="check which checkpoint is which, --modules and the rule")
    if len(kept) < len(found):
        made = leftover(compared, kept, drop=drop_extra)
    pairs, told = work.pairs(found, kept)
    adapter = Frame(made, base_model, conv1d, tied).adapter(pairs)
    return Extraction(adapter, told, work.unchanged, (*skipped, *made.left_out), tuple(made.notes))


def _untied(
    base: Tensors, base_config: Mapping[str, Any] | None, tuned: Tensors, tuned_config: Mapping[str, Any] | None
) -> tuple[Tensors, Tensors, str | None]:
    """Both with a head of its own where one of them has it and the other shares the weight of its embedding.

    And the name of the embedding whose numbers the head has in both.
    """
    ours, theirs = Tied.of(tuned, tuned_config or {}), Tied.of(base, base_config or {})
    if ours.lacks_head == theirs.lacks_head:
        shared = ours.ties.embedding if ours.lacks_head and tuned_config else None  # without one it may have no head
        return base, tuned, shared and shared.removesuffix(".weight")
    return theirs.shown(base), ours.shown(tuned), None


def _hidden(config: Mapping[str, Any]) -> int | None:
    """The hidden size that ``config.json`` says: of the text model, where it is one of several."""
    text = config.get("text_config")
    said = config.get("hidden_size", text.get("hidden_size") if isinstance(text, dict) else None)
    return said if isinstance(said, int) else None


def _chosen(compared: Comparison, globs: Sequence[str]) -> set[str]:
    """The modules that are asked for: by default all but embeddings."""
    if globs:
        return set(select(compared.matrices, globs))
    return {name for name in compared.matrices if not is_embedding(name)}


def _nbytes(adapter: Adapter) -> int:
    return adapter.nbytes + sum(extra.tensor.nbytes for extra in adapter.extra.values())


@final
@dataclass(slots=True)
class _Work:
    """One extraction under way."""

    compared: Comparison
    rule: Rule | NoiseEdge
    chosen: set[str]
    one_rank: bool
    exact: bool
    dtype: np.dtype[Any]
    threads: int
    step: Step | None
    unchanged: int = 0

    def look(self) -> tuple[dict[str, Triplets], list[LeftOut]]:
        """The triplets of every chosen matrix that differs, and the others that differ."""
        matrices = self.compared.matrices
        count = self._start()
        found = self._each(sorted(self.chosen, key=natural_key), lambda name, t: self._triplets(name, count, t))
        stacks = shared_ranks({name: self._stub(name, 1) for name in found})
        moved = {stacks.get(name, name) for name, one in found.items() if one.norm}
        still = [name for name in found if stacks.get(name, name) not in moved]
        others = [name for name in matrices if name not in self.chosen]
        norms = self._each(others, lambda name, _: self._norm(name))
        self.unchanged = len(still) + sum(not norm for norm in norms.values())
        left = [
            LeftOut(name, "an embedding: --modules asks for it" if is_embedding(name) else "not asked for", norm)
            for name, norm in norms.items()
            if norm
        ]
        return {name: one for name, one in found.items() if name not in still}, left

    def _start(self) -> int | None:
        """Directions of each matrix that a budget makes worth looking at first: twice those of one rank for all."""
        if isinstance(self.rule, NoiseEdge) or not self.rule.budget:
            return None
        price = sum(self._price(name) for name in self.chosen)
        return max(START, 2 * int(self.rule.value / max(price, 1)))

    def _price(self, name: str) -> int:
        """What one direction takes, in the unit of the budget."""
        numbers = sum(self.compared.matrices[name].shape)
        return numbers * (self.dtype.itemsize if isinstance(self.rule, Rule) and self.rule.name == "bytes" else 1)

    def _each(self, names: Sequence[str], work: Callable[[str, int], Any]) -> dict[str, Any]:
        """``work`` of every name with so many threads of its own: big ones one after the other, small ones beside."""
        big = [name for name in names if self._size(name) >= BIG]
        rest = [name for name in names if self._size(name) < BIG]
        found = {name: self._one(name, work, self.threads) for name in big}
        found |= in_threads(lambda name: self._one(name, work, 1), rest, self.threads)
        return {name: found[name] for name in names}

    def _one(self, name: str, work: Callable[[str, int], Any], threads: int) -> Any:
        with place(name):
            result = work(name, threads)
        if self.step:
            self.step(self._size(name))
        return result

    def _size(self, name: str) -> int:
        rows, columns = self.compared.matrices[name].stored
        return rows * columns

    def _triplets(self, name: str, count: int | None, threads: int) -> Triplets:
        difference = self.compared.matrices[name]
        return triplets(name, difference, self.rule, count=count, exact=self.exact, threads=threads)

    def _norm(self, name: str) -> float:
        """‖D‖_F; 0 where only the dtype differs."""
        if not self.compared.matrices[name].differs():
            return 0.0
        return sqrt(sum(float(np.vdot(block, block)) for _, block, _ in self.compared.matrices[name].blocks()))

    def ranks(self, found: dict[str, Triplets], size: Size, frame: Frame) -> dict[str, int]:
        """The rank of every module; where that is all that was looked at of a matrix, more of it is looked at first."""
        while True:
            chosen = self._ranks(found, size, frame)
            more = [name for name, rank in chosen.items() if self._short(found[name], rank)]
            if not more:
                return chosen
            for name in more:
                count = min(max(2 * found[name].count, chosen[name]), min(self.compared.matrices[name].shape))
                found[name] = self._triplets(name, count, self.threads)

    def _short(self, one: Triplets, rank: int) -> bool:
        """Whether more of a matrix must be looked at before this rank can stand."""
        if one.whole:
            return one.count < min(rank, one.s.size)
        budget = isinstance(self.rule, Rule) and self.rule.budget
        return rank > one.count or (budget and rank == one.count)

    def _ranks(self, found: Mapping[str, Triplets], size: Size, frame: Frame) -> dict[str, int]:
        shared = shared_ranks({name: self._stub(name, 1) for name in found})
        if isinstance(self.rule, NoiseEdge):
            return self._above(found, shared)

        def sized(chosen: Mapping[str, int]) -> int:
            made = frame.adapter({name: self._stub(name, rank) for name, rank in chosen.items()})
            return size(made) if self.rule.name == "bytes" else made.parameters  # type: ignore[union-attr]

        widest = max((min(self.compared.matrices[name].shape) for name in found), default=1)  # zeros fill narrower ones
        return ranks(
            {name: one.spectrum() for name, one in found.items()},
            {name: self._price(name) for name in found},
            self.rule,
            shared=shared,
            one_rank=self.one_rank,
            widths=dict.fromkeys(found, widest),
            size=sized,
        )

    def _above(self, found: Mapping[str, Triplets], shared: Mapping[str, str]) -> dict[str, int]:
        """What stands above the noise, of all that share a rank as many as one of them needs; none where none does."""
        most: dict[str, int] = {}
        for name, one in found.items():
            group = shared.get(name, name)
            most[group] = max(most.get(group, 0), one.above() if one.norm else 0)
        if self.one_rank:
            top = max(most.values(), default=0)
            most = {group: top if rank else 0 for group, rank in most.items()}
        return {name: most[shared.get(name, name)] for name in found}

    def _stub(self, name: str, rank: int) -> LowRank:
        """A module of this rank whose factors nobody reads."""
        out, in_ = self.compared.matrices[name].shape
        B, A = (LazyArray(_unread, shape=shape, dtype=self.dtype) for shape in ((out, rank), (rank, in_)))
        return LowRank(B, A, 1.0, scaling=_unit(rank), layout=self.compared.matrices[name].layout)

    def pairs(
        self, found: Mapping[str, Triplets], chosen: Mapping[str, int]
    ) -> tuple[dict[str, LowRank], dict[str, Extracted]]:
        """The modules at their ranks, and what each of them holds of its difference."""
        self.step = None

        def make(name: str, threads: int) -> tuple[LowRank, Extracted]:
            del threads
            return _pair(self.compared.matrices[name], found[name], chosen[name], self.dtype)

        made = self._each(sorted(chosen, key=natural_key), make)
        return {name: pair for name, (pair, _) in made.items()}, {name: told for name, (_, told) in made.items()}


def _pair(difference: Difference, found: Triplets, rank: int, dtype: np.dtype[Any]) -> tuple[LowRank, Extracted]:
    left, right = found.factors(rank, dtype)
    B, A = (right, left.T) if difference.tuned.transposed else (left, right.T)
    lost = measured_error(difference, left, right)
    rows, columns = difference.stored
    spread = lost / sqrt(rows * columns)
    told = Extracted(
        difference.shape,
        rank,
        found.norm,
        lost / found.norm if found.norm else 0.0,
        found.error,
        found.noise,
        spread / found.noise if found.noise else float("inf"),
        found.edge,
    )
    pair = LowRank(np.ascontiguousarray(B), np.ascontiguousarray(A), 1.0, scaling=_unit(rank), layout=difference.layout)
    return pair, told


def _unit(rank: int) -> Scaling:
    """Scale 1, said as α = r: everything is in the factors, so no file has to round it."""
    return Scaling("alpha/r", rank, rank, "scale 1, in the factors")


def _unread() -> NoReturn:
    raise AssertionError("only the size of a file is asked for")
