"""Extraction of an adapter from tuned − base, for a full fine-tune or a checkpoint that another tool merged."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, prod, sqrt
from typing import Any, final

import numpy as np

from loralens.core.adapter import Adapter, Extra
from loralens.core.lazy import without_numbers
from loralens.core.lowrank import LowRank, Scaling
from loralens.core.names import natural_key, some
from loralens.core.ranks import Rule, rank_items, ranks_from_items, shared_ranks
from loralens.core.selection import select
from loralens.core.threads import Step, in_threads
from loralens.errors import OptionError, place
from loralens.merging.checkpoint_difference import (
    START,
    CheckpointComparison,
    MatrixDifference,
    NoiseEdge,
    Tensors,
    Triplets,
    compare_checkpoints,
    compute_triplets,
    is_depthwise,
    is_embedding,
    may_be_grouped,
    measured_error,
    values_differ,
)
from loralens.merging.planning import Tied

PREFIX = "base_model.model."  # PEFT's keys begin with it
RESIZED = ("embed_tokens", "lm_head")  # PEFT stores their full matrix without listing them in modules_to_save


@final
@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tensor that differs and is not in the adapter.

    Attributes
    ----------
    key : str
        A key of the tuned checkpoint, or the name of a module.
    norm : float or None
        ‖tuned − base‖_F, if it was measured.
    """

    key: str
    why: str
    norm: float | None = None


@final
@dataclass(slots=True)
class Leftover:
    """The part of an extracted adapter other than its pairs.

    Attributes
    ----------
    extra : dict of str to Extra
        Tensors by PEFT's keys.
    saved : list of str
        Modules for ``modules_to_save``.
    """

    extra: dict[str, Extra] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def save(self, module: str, tensors: Tensors) -> None:
        """Save a module in full, with all of its tensors, as PEFT needs them."""
        if module in self.saved:
            return
        self.saved.append(module)
        for key, tensor in tensors.items():
            path, _, parameter = key.rpartition(".")
            if path == module:
                self.extra[PREFIX + key] = Extra("saved", module, tensor, parameter)


def collect_leftover(comparison: CheckpointComparison, adapted: Collection[str], *, drop: bool = False) -> Leftover:
    """Collect the differences other than those of matrices.

    Parameters
    ----------
    comparison : CheckpointComparison
    adapted : collection of str
        Modules that have a pair.
    drop : bool
        Store none of them, and list all as left out.
    """
    collected = Leftover()
    for key, (base, tuned) in comparison.other_tensors.items():
        if values_differ(base.read(), tuned.read()):
            _collect_changed(key, comparison, adapted, collected)
    layers = {key.rpartition(".")[0] for key in comparison.tuned if key not in comparison.added}
    for key in comparison.added:
        module = key.rpartition(".")[0]
        # A layer that is new as a whole can be saved; PEFT cannot add a tensor to an existing one.
        if module and module not in layers:
            collected.save(module, comparison.tuned)
        else:
            collected.left_out.append(LeftOut(key, "PEFT cannot add it to a layer that the base already has"))
    for key, shape in comparison.resized.items():
        _collect_resized(key, shape, comparison.tuned, collected)
    # Collected first and dropped here, so that the report still names everything.
    if drop:
        collected.left_out += [LeftOut(key.removeprefix(PREFIX), "dropped on request") for key in collected.extra]
        collected.extra, collected.saved, collected.notes = {}, [], []
    collected.saved.sort(key=natural_key)
    collected.notes += _notes(comparison, adapted)
    return collected


def _collect_changed(key: str, comparison: CheckpointComparison, adapted: Collection[str], collected: Leftover) -> None:
    """Add a tensor that differs to the collection, in the form in which PEFT stores it."""
    module, _, parameter = key.rpartition(".")
    tensor = comparison.tuned[key]
    if parameter == "bias" and (module in comparison.matrices or f"{module}.weight" not in comparison.tuned):
        # PEFT puts the original layer below `base_layer` when the module has a pair. A parameter without a layer of its
        # own may have a pair too; PEFT then wraps the module that holds it.
        parameters = [name for name in adapted if comparison.matrices[name].layout.kind == "parameter"]
        wrapped = module in adapted or any(name.rpartition(".")[0] == module for name in parameters)
        layer = f"{module}.base_layer" if wrapped else module
        collected.extra[f"{PREFIX}{layer}.bias"] = Extra("bias", module, tensor, "bias")
    elif _is_norm(module, comparison.tuned) or (parameter == "weight" and is_depthwise(tensor.shape)):
        collected.save(module, comparison.tuned)
    # A matrix that is a parameter of a module with children: see `_matrices` in `differences`.
    elif module and len(tensor.shape) == 2 and tensor.dtype.kind in "fV":
        collected.left_out.append(LeftOut(key, "belongs to a module with layers in it, and PEFT would rename them"))
    else:
        collected.left_out.append(LeftOut(key, "is not the weight of a layer, and no module can be saved for it"))


def _is_norm(module: str, tensors: Tensors) -> bool:
    """Whether a module is a norm or similar: it has a weight, and no tensor with more than one axis."""
    own = [tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == module]
    return f"{module}.weight" in tensors and all(len(tensor.shape) <= 1 for tensor in own)


def _collect_resized(key: str, shape: tuple[int, ...], tuned: Tensors, collected: Leftover) -> None:
    """Save a tensor in full because its shape in the tuned model is not its shape in the base, ``shape``."""
    module, _, parameter = key.rpartition(".")
    tensor = tuned[key]
    if parameter == "weight" and len(shape) == len(tensor.shape) == 2 and shape[1] == tensor.shape[1]:
        what = "vocabulary resized" if is_embedding(module) or module.endswith("lm_head") else "resized"
        collected.notes.append(f"{key}: {what} from {shape[0]:,} to {tensor.shape[0]:,} rows, kept in full")
    else:
        collected.notes.append(f"{key}: {shape} in the base and {tensor.shape} in the tuned model, kept in full")
    # The role decides under which key PEFT looks for the tensor.
    if module.rpartition(".")[2] in RESIZED:
        collected.extra[PREFIX + key] = Extra("embedding", module, tensor, parameter)
    else:
        collected.save(module, tuned)


def _notes(comparison: CheckpointComparison, adapted: Collection[str]) -> list[str]:
    """Notes about the comparison itself."""
    notes = [f"names match after {comparison.edit}"] if comparison.edit else []
    missing = comparison.missing
    if missing:
        notes.append(f"{len(missing)} tensors of the base are not in the tuned model: {some(missing)}")
    doubtful = sorted((name for name in adapted if may_be_grouped(comparison.matrices[name])), key=natural_key)
    if doubtful:
        what = (
            f"{len(doubtful)} convolutions are treated as ones without groups, because their shapes do not show groups"
        )
        notes.append(f"{what}: {some(doubtful)}")
    return notes


@final
@dataclass(frozen=True, slots=True)
class ExtractedModule:
    """How well a pair represents the difference D of its module. Norms have the unit of the weights.

    Attributes
    ----------
    shape : tuple of int
        (out, in).
    frobenius : float
        ‖D‖_F.
    relative_error : float
        ‖D − B·A‖_F/‖D‖_F, measured on every entry with the factors as they are written.
    svd_error : float
        Error bound of the randomised SVD, relative to √Σσ² of its values; 0 if the SVD was dense.
    noise : float
        √(mean ulp²/12) of the tuned weight, the rounding noise of one entry.
    residue : float
        Root mean square of an entry of D − B·A in units of ``noise``. It is about 1 if only rounding noise is left, and
        much larger if D has more directions than the pair. Infinite if ``noise`` is 0.
    edge : float or None
        The threshold for singular values under `NoiseEdge`.
    """

    shape: tuple[int, int]
    rank: int
    frobenius: float
    relative_error: float
    svd_error: float
    noise: float
    residue: float
    edge: float | None

    @property
    def energy_kept(self) -> float:
        """The share of the energy in the pair, 1 − relative_error², at least 0."""
        return max(0.0, 1 - self.relative_error**2)


@final
@dataclass(frozen=True, slots=True)
class Extraction:
    """An extracted adapter, and how well it represents the difference of the checkpoints.

    Attributes
    ----------
    adapter : Adapter
        It has the names of the tuned checkpoint, balanced factors and scale 1.
    modules : mapping of str to ExtractedModule
        One for each pair, in natural order.
    unchanged : int
        Number of matrices that are equal in both checkpoints.
    left_out : tuple of LeftOut
        Tensors that differ and are not in the adapter.
    """

    adapter: Adapter
    modules: Mapping[str, ExtractedModule]
    unchanged: int
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """The relative error of all pairs together, √Σ‖D − B·A‖² / √Σ‖D‖²."""
        norm = sqrt(sum(module.frobenius**2 for module in self.modules.values()))
        lost = sqrt(sum((module.frobenius * module.relative_error) ** 2 for module in self.modules.values()))
        return lost / norm if norm else 0.0

    @property
    def share(self) -> float:
        """The share of Σ‖D‖² over all matrices that belongs to matrices with a pair."""
        inside = sum(module.frobenius**2 for module in self.modules.values())
        # Only matrices have a norm; other tensors are not measured.
        outside = sum(tensor.norm**2 for tensor in self.left_out if tensor.norm is not None)
        return inside / (inside + outside) if inside else 0.0


def _assemble(
    pairs: Mapping[str, LowRank], leftover: Leftover, base_model: str | None, conv1d: bool, tied: str | None
) -> Adapter:
    """The adapter with these pairs. The writer adds ranks and `target_modules` to its configuration.

    ``tied`` is the embedding to which the head is tied in both checkpoints. If it has a pair, the pair is for both.
    """
    # PEFT would otherwise adapt the embedding alone and leave the shared head as it is.
    config: dict[str, object] = {"ensure_weight_tying": True} if tied in pairs else {}
    config |= {
        "peft_type": "LORA",
        # Nothing in two checkpoints says what the model was tuned for.
        "task_type": None,
        "base_model_name_or_path": base_model,
        # PEFT's "all", not "lora_only": biases of layers without a pair may differ too.
        "bias": "all" if any(extra.role == "bias" for extra in leftover.extra.values()) else "none",
        "fan_in_fan_out": conv1d,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "modules_to_save": leftover.saved or None,
        "use_dora": False,
        "use_rslora": False,
    }
    metadata = {"format": "pt"}  # as PEFT writes it
    return Adapter(modules=pairs, extra=leftover.extra, config=config, metadata=metadata, base_model=base_model)


# A matrix of this size takes 64 MiB in float32, so several at a time would need too much memory.
BIG = 1 << 24  # entries; matrices with at least as many are processed one at a time, with all threads in the products

Size = Callable[[Adapter], int]


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
    """Extract the adapter that is nearest to tuned − base at the ranks that ``rule`` gives.

    Parameters
    ----------
    base, tuned : mapping of str to LazyArray
        Tensors of any float dtypes. The base is used as it is; the tuned weights are assumed to be base + ΔW, rounded
        once.
    rule : Rule or NoiseEdge
        A rank rule as for compression, or the rule that keeps the directions above the noise.
    base_config, tuned_config : mapping or None
        ``config.json`` of both. It says whether head and embedding are tied, and how experts are stored.
    base_model : str or None
        The name of the base model for the configuration of the adapter.
    modules : sequence of str
        Globs over names or kinds of modules. The default is every matrix except embeddings.
    one_rank : bool
        Give all modules the same rank, which some servers need.
    conv1d : bool
        Whether linear weights are stored as (in, out).
    exact : bool
        Compute dense SVDs in float64, which takes minutes for a matrix of 4096 × 4096. Small ones are always dense.
    dtype : dtype
        The dtype of the factors.
    drop_extra : bool
        Leave out changed tensors that are not matrices: norms, biases, separate heads.
    size : callable, optional
        Maps an adapter to the bytes of its file, for a rule in bytes. The default counts the bytes of the factors.
    threads : int
        Number of threads. More than one helps only if BLAS itself uses one.
    step : callable, optional
        Called with the number of entries of each matrix when it is done.

    Raises
    ------
    OptionError
        No matrix differs, no direction is above the noise, a budget is too small, or a glob matches nothing.
    FormatError
        A difference has NaN or infinite numbers.

    Notes
    -----
    The truncated SVD is the best approximation (Eckart & Young 1936). The memory is a few times the largest matrix in
    float32 (float64 for a dense SVD), times the number of threads for matrices below 16 million entries, plus the
    triplets. Weights that differ are read three times: for the comparison, for the SVD, and for the error of the pair.
    """
    base, tuned, tied = _separate_heads(base, base_config, tuned, tuned_config)
    config = tuned_config or {}
    text = config.get("text_config")
    hidden = config.get("hidden_size", text.get("hidden_size") if isinstance(text, dict) else None)
    compared = compare_checkpoints(base, tuned, conv1d=conv1d, hidden=hidden if isinstance(hidden, int) else None)
    if not compared.matrices:
        raise OptionError("the two checkpoints share no weight matrix", fix="give two checkpoints of one model")
    if isinstance(rule, Rule) and rule.name == "parameters" and rule.value <= 1:
        raise OptionError(
            "a share of the parameters needs an adapter to refer to, but there is none", fix="give a count, or --size"
        )
    names = select(compared.matrices, modules) if modules else compared.matrices
    chosen = {name for name in names if modules or not is_embedding(name)}
    work = _ExtractionRun(compared, rule, chosen, one_rank, exact, np.dtype(dtype), threads, step)
    results, skipped = work.measure()
    # The size of the file counts the extras, so they are collected before the ranks are chosen.
    extras = collect_leftover(compared, results, drop=drop_extra)

    def size_of(ranks_of: Mapping[str, int]) -> int:
        # The exact size depends on the header, so an adapter without numbers is made for every trial.
        pairs = {name: work.stub(name, rank) for name, rank in ranks_of.items()}
        adapter = _assemble(pairs, extras, base_model, conv1d, tied)
        if not (isinstance(rule, Rule) and rule.name == "bytes"):
            return adapter.parameters
        return size(adapter) if size else adapter.nbytes + sum(one.tensor.nbytes for one in adapter.extra.values())

    ranked = work.ranks(results, size_of)
    chosen_ranks = {name: rank for name, rank in ranked.items() if rank}
    noise = [
        LeftOut(name, "nothing rises above the noise", results[name].norm)
        for name in ranked
        if name not in chosen_ranks
    ]
    # A module of a stack may be equal in both checkpoints: nothing of it is lost.
    skipped += [module for module in noise if module.norm]
    if not chosen_ranks:
        count = len(skipped)
        what = f"{count} matrices differ, but none is extracted: {skipped[0].why}" if count else "no matrix differs"
        raise OptionError(what, fix="check which checkpoint is which, --modules and the rule")
    # The key of a bias depends on whether its module has a pair, so the extras are collected again.
    if len(chosen_ranks) < len(results):
        extras = collect_leftover(compared, chosen_ranks, drop=drop_extra)
    pairs, measurements = work.pairs(results, chosen_ranks)
    adapter = _assemble(pairs, extras, base_model, conv1d, tied)
    return Extraction(adapter, measurements, work.unchanged, (*skipped, *extras.left_out), tuple(extras.notes))


def _separate_heads(
    base: Tensors, base_config: Mapping[str, Any] | None, tuned: Tensors, tuned_config: Mapping[str, Any] | None
) -> tuple[Tensors, Tensors, str | None]:
    """Give both checkpoints a separate head if only one of them has one and the other ties it to the embedding.

    The third result is the name of the embedding if the head is tied to it in both.
    """
    ours, theirs = Tied.of(tuned, tuned_config or {}), Tied.of(base, base_config or {})
    if ours.lacks_head == theirs.lacks_head:
        # Without a configuration the model may have no head at all.
        shared = ours.ties.embedding if ours.lacks_head and tuned_config else None
        return base, tuned, shared and shared.removesuffix(".weight")
    return theirs.ties.with_copies(base), ours.ties.with_copies(tuned), None


@final
@dataclass(slots=True)
class _ExtractionRun:
    """The state of one extraction."""

    compared: CheckpointComparison
    rule: Rule | NoiseEdge
    chosen: set[str]
    one_rank: bool
    exact: bool
    dtype: np.dtype[Any]
    threads: int
    step: Step | None
    unchanged: int = 0

    def measure(self) -> tuple[dict[str, Triplets], list[LeftOut]]:
        """The triplets of every selected matrix that differs, and a list of the other matrices that differ."""
        matrices = self.compared.matrices
        # Under a budget twice the rank that all modules could have, because some get more than the mean rank.
        price = sum(self._price(name) for name in self.chosen)
        budget = self.rule.value if isinstance(self.rule, Rule) and self.rule.budget else None
        count = None if budget is None else max(START, 2 * int(budget / max(price, 1)))
        results = self._run_all(sorted(self.chosen, key=natural_key), lambda name, t: self._triplets(name, count, t))
        stacks = shared_ranks({name: self.stub(name, 1) for name in results})
        # A stack is one tensor in the file: if one expert differs, all of them get a pair.
        moved = {stacks.get(name, name) for name, triplets in results.items() if triplets.norm}
        unchanged = [name for name in results if stacks.get(name, name) not in moved]
        unchosen = [name for name in matrices if name not in self.chosen]
        norms = self._run_all(unchosen, lambda name, _: matrices[name].norm())
        self.unchanged = len(unchanged) + sum(not norm for norm in norms.values())
        left_out = [
            LeftOut(name, "an embedding: select it with --modules" if is_embedding(name) else "not selected", norm)
            for name, norm in norms.items()
            if norm
        ]
        return {name: triplets for name, triplets in results.items() if name not in unchanged}, left_out

    def _price(self, name: str) -> int:
        """The cost of one direction of a module, in the unit of the budget."""
        numbers = sum(self.compared.matrices[name].shape)
        return numbers * (self.dtype.itemsize if isinstance(self.rule, Rule) and self.rule.name == "bytes" else 1)

    def _run_all(self, names: Sequence[str], work: Callable[[str, int], Any]) -> dict[str, Any]:
        """Call ``work(name, threads)`` for every name: big matrices one at a time, small ones in parallel."""
        big = [name for name in names if self._size(name) >= BIG]
        small = [name for name in names if self._size(name) < BIG]

        def run(name: str, threads: int) -> Any:
            with place(name):
                result = work(name, threads)
            if self.step:
                self.step(self._size(name))
            return result

        results = {name: run(name, self.threads) for name in big}
        results |= in_threads(lambda name: run(name, 1), small, self.threads)
        return {name: results[name] for name in names}

    def _size(self, name: str) -> int:
        return prod(self.compared.matrices[name].stored)

    def _triplets(self, name: str, count: int | None, threads: int) -> Triplets:
        difference = self.compared.matrices[name]
        return compute_triplets(name, difference, self.rule, count=count, exact=self.exact, threads=threads)

    def ranks(self, results: dict[str, Triplets], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        """Choose the rank of every module; compute more directions first where those of a matrix do not suffice."""
        while True:
            chosen = self._ranks(results, size)
            undecided = [name for name, rank in chosen.items() if self._needs_more(results[name], rank)]
            if not undecided:
                return chosen
            for name in undecided:
                count = min(max(2 * results[name].count, chosen[name]), min(self.compared.matrices[name].shape))
                results[name] = self._triplets(name, count, self.threads)

    def _needs_more(self, result: Triplets, rank: int) -> bool:
        """Whether this rank needs more directions of a matrix than have been computed."""
        if result.is_complete:
            return result.count < min(rank, result.s.size)
        # Under a budget a module that takes all its known directions may want the next one too.
        budget = isinstance(self.rule, Rule) and self.rule.budget
        return rank > result.count or (budget and rank == result.count)

    def _ranks(self, results: Mapping[str, Triplets], size: Callable[[Mapping[str, int]], int]) -> dict[str, int]:
        shared = shared_ranks({name: self.stub(name, 1) for name in results})
        if isinstance(self.rule, NoiseEdge):
            return self._ranks_above_noise(results, shared, self.rule.ceiling)
        # One rank for all may be as large as the widest module allows. Factors of other modules are padded with zeros.
        widest = max((min(self.compared.matrices[name].shape) for name in results), default=1)
        spectra = {name: triplets.spectrum() for name, triplets in results.items()}
        items = rank_items(
            spectra,
            {name: self._price(name) for name in results},
            shared=shared,
            one_rank=self.one_rank,
            widths=dict.fromkeys(results, widest),
            ceiling=self.rule.ceiling,
        )
        return ranks_from_items(items, self.rule, spectra, one_rank=self.one_rank, size=size)

    def _ranks_above_noise(
        self, results: Mapping[str, Triplets], shared: Mapping[str, str], ceiling: int | None
    ) -> dict[str, int]:
        """The number of directions above the noise; modules that share a rank get the largest number among them."""
        most: dict[str, int] = {}
        for name, result in results.items():
            group = shared.get(name, name)
            above = min(result.above(), ceiling or result.s.size) if result.norm else 0
            most[group] = max(most.get(group, 0), above)
        if self.one_rank:
            top = max(most.values(), default=0)
            most = {group: top if rank else 0 for group, rank in most.items()}
        return {name: most[shared.get(name, name)] for name in results}

    def stub(self, name: str, rank: int) -> LowRank:
        """A module of this rank without numbers, which is enough to compute sizes."""
        out, in_ = self.compared.matrices[name].shape
        B, A = (without_numbers(shape, self.dtype) for shape in ((out, rank), (rank, in_)))
        return LowRank(B, A, 1.0, scaling=_unit_scaling(rank), layout=self.compared.matrices[name].layout)

    def pairs(
        self, results: Mapping[str, Triplets], chosen: Mapping[str, int]
    ) -> tuple[dict[str, LowRank], dict[str, ExtractedModule]]:
        """The modules at their ranks, and the measured error of each."""
        # The progress has counted every matrix already.
        self.step = None

        # The error is measured block by block; there is nothing to share between threads.
        modules = self._run_all(
            sorted(chosen, key=natural_key),
            lambda name, _: _make_pair(self.compared.matrices[name], results[name], chosen[name], self.dtype),
        )
        return {name: pair for name, (pair, _) in modules.items()}, {name: told for name, (_, told) in modules.items()}


def _make_pair(
    difference: MatrixDifference, result: Triplets, rank: int, dtype: np.dtype[Any]
) -> tuple[LowRank, ExtractedModule]:
    # The triplets are those of the stored orientation; B belongs to the outputs.
    left_factor, right_factor = result.factors(rank, dtype)
    B, A = (right_factor, left_factor.T) if difference.tuned.transposed else (left_factor, right_factor.T)
    lost = measured_error(difference, left_factor, right_factor)
    relative_error = lost / result.norm if result.norm else 0.0
    # Root mean square of an entry, which is compared with the rounding noise of one entry.
    spread = lost / sqrt(prod(difference.stored))
    residue = spread / result.noise if result.noise else inf
    pair = LowRank(
        np.ascontiguousarray(B), np.ascontiguousarray(A), 1.0, scaling=_unit_scaling(rank), layout=difference.layout
    )
    return pair, ExtractedModule(
        difference.shape, rank, result.norm, relative_error, result.error, result.noise, residue, result.edge
    )


def _unit_scaling(rank: int) -> Scaling:
    """The scale 1, expressed as α = r. The strength is in the factors, so no file has to round a scale."""
    return Scaling("alpha/r", rank, rank, "scale 1, in the factors")
