"""`Switchboard`: a model in memory that is merged for one task at a time, and whose base stays exact.

A weight is merged by the same path as a file of `loralens merge`, and restored by the same patch, so it has the same
bits.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.names import nearest
from loralens.errors import LEAVE_EXTRA_OUT, MismatchError, OptionError, place
from loralens.linalg.device import Device
from loralens.merging.codec import hash_rows, prepare_merge
from loralens.merging.merge_plan import MergePlan, TensorPlan
from loralens.merging.merge_record import MergeRecorder
from loralens.merging.planning import have_same_change, plan_merge
from loralens.merging.undo import TensorUndo, restored_rows
from loralens.merging.weight_slots import (
    TensorSlot,
    WeightSlot,
    check_slot_writable,
    has_conv1d_layers,
    lazy_weight,
    slots_of,
)

if TYPE_CHECKING:  # importing torch takes 1.4 s, and only its type is needed
    from torch import nn

Wanted = str | Mapping[str, float] | None
Task = tuple[tuple[str, float], ...]  # what is merged: names of adapters and their weights; empty for the base
MOST_THREADS = 4  # by default; more of them wait for memory, and each holds a copy of a weight
UNTIED = {"tie_word_embeddings": False}  # tied weights are found by their memory address, not by the configuration


@final
@dataclass(frozen=True, slots=True)
class SwitchboardState:
    """The state of a switchboard.

    Attributes
    ----------
    task : mapping of str to float
        The adapters and weights for which the model is merged, or to which it is being switched; empty for the base.
    waiting : tuple of str
        Weights that an interrupted switch has not yet changed.
    weights : int
        Number of weights that some adapter changes.
    """

    task: Mapping[str, float]
    waiting: tuple[str, ...]
    weights: int

    @property
    def is_complete(self) -> bool:
        """Whether all weights are in the state of the task."""
        return not self.waiting


@final
@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Bytes of memory that a switchboard uses in addition to the model.

    Attributes
    ----------
    factors : mapping of str to int
        All tensors of each adapter; none of views.
    patch : int
        Patches that restore the base from the current task.
    patch_factors : int
        Factors of the current task to which patches are relative, where they are a copy of those of a view.
    copies : int
        Weights of the base that the current task replaces.
    """

    factors: Mapping[str, int]
    patch: int
    copies: int
    patch_factors: int = 0

    @property
    def total(self) -> int:
        """The total number of bytes."""
        return sum(self.factors.values()) + self.patch + self.patch_factors + self.copies


class _MergedWeight(NamedTuple):
    """What restores the base of a merged weight: a patch, or a copy of the base if the adapter replaces it.

    ``factor_bytes`` are the bytes of the factors, if they are a copy that this merge made.
    """

    task: Task
    undo: TensorUndo | Array
    factor_bytes: int = 0

    @property
    def patch_bytes(self) -> int:
        """Bytes of the patch and of the factors of DoRA."""
        if not isinstance(self.undo, TensorUndo):
            return 0
        return self.undo.patch.nbytes + sum(factors.values.nbytes for factors in self.undo.segment_factors.values())


@final
class Switchboard:
    """A model in memory that is merged for one task at a time. Its weights are changed in place.

    Parameters
    ----------
    model : torch module, or mapping of str to array
        Weights of any float dtype; arrays must be writable. Parameters on another device than the CPU are copied to it
        and back, one at a time. Of a model that FSDP2 divides, each process merges its own rows; all processes must
        make the same calls. Training and `load_state_dict` change the base, so merged tasks cannot be undone
        afterwards.
    adapters : mapping of str to Adapter
        The tasks. Pairs of every kind, LyCORIS products, DoRA (alone, not mixed), biases, token rows and saved modules
        are merged as by `loralens merge`. Weights and extras for which the model has no place are refused.
    conv1d : bool or None
        Whether linear weights are stored as (in, out). The default looks at the layers of a torch module, and is false
        for arrays.
    keep_tied : bool
        Let a head that shares the numbers of the embedding change with it, even if the unmerged adapter does not.
    threads : int, optional
        Number of weights that are processed in parallel. By default it is that of torch, but at most 4, for a model of
        torch, and 1 for arrays, where more than one helps only if BLAS itself uses one. The result does not depend on
        it. Weights that are divided over processes are processed one by one.
    views : bool
        The adapters are views of models in memory (`loralens.live`). They are read anew by each switch, and no copy is
        kept of their factors between switches.

    Attributes
    ----------
    notes : tuple of str
        Messages about the tasks for the user.

    Raises
    ------
    MismatchError
        An adapter does not fit the model, or would change a weight that others share.

    Notes
    -----
    Subtracting D does not restore W, because rounding gives several W the same W'. So a patch is kept for every weight
    of the current task, W = patch(round(W' − D)), which takes 0.05 to 1.3 bits per weight. After any number of switches
    the base is the original, bit for bit. A switch costs two products for each adapted weight, and the patch. The
    forward pass costs the same as without adapters. During a switch one weight for each thread is in memory twice.
    """

    def __init__(
        self,
        model: "nn.Module | Mapping[str, Array]",
        adapters: Mapping[str, Adapter],
        *,
        conv1d: bool | None = None,
        keep_tied: bool = False,
        threads: int | None = None,
        views: bool = False,
    ) -> None:
        self._slots: dict[str, WeightSlot] = slots_of(model)
        self._base = {key: lazy_weight(slot) for key, slot in self._slots.items()}
        addresses: dict[int, list[str]] = {}
        for key, slot in self._slots.items():
            addresses.setdefault(slot.address, []).append(key)
        # The other weights that share the numbers of a weight.
        self._sharing = {key: [one for one in keys if one != key] for keys in addresses.values() for key in keys}
        self._conv1d = has_conv1d_layers(model) if conv1d is None else conv1d
        # Threads would gather weights in another order in each process.
        divided = any(slot.shard is not None for slot in self._slots.values())
        if threads is None and any(isinstance(slot, TensorSlot) for slot in self._slots.values()):
            import torch

            # As many threads as torch uses, which then uses one in each.
            threads = min(torch.get_num_threads(), MOST_THREADS)
        self._threads, self._keep_tied, self._views = 1 if divided else threads or 1, keep_tied, views
        self._held = {name: one if views else one.load() for name, one in adapters.items()}
        self._merged: dict[str, _MergedWeight] = {}
        # The requested task, and the weights that it changes.
        self._goal: tuple[Task, frozenset[str]] = ((), frozenset())
        # A new weight, and what restores it, are here from before the first byte is written until after the last one,
        # so that writing can be finished later.
        self._writing: dict[str, tuple[Array, _MergedWeight | None]] = {}
        self._plans: dict[Task, Mapping[str, TensorPlan]] = {(): {}}  # of the base, and of every adapter alone
        self._hashes: dict[str, str] = {}
        self.notes: tuple[str, ...] = ()
        for name in adapters:
            self._add_plan(name)

    @property
    def state(self) -> SwitchboardState:
        """The current task, and the weights that an interrupted switch has not yet changed."""
        task, touched = self._goal
        # A weight waits as long as it is merged for another task than the one that was requested last.
        now = {key: self._merged[key].task if key in self._merged else () for key in self._hashes}
        waiting = tuple(key for key in self._hashes if now[key] != (task if key in touched else ()))
        return SwitchboardState(dict(task), waiting, len(self._hashes))

    def switch(self, task: Wanted) -> None:
        """Merge the model for another task.

        Parameters
        ----------
        task : str, mapping of str to float, or None
            The name of an adapter, or names of several with their weights, or None for the base itself.

        Raises
        ------
        OptionError
            There is no adapter of that name, or a weight is not a finite number.
        MismatchError
            The adapters cannot be mixed: two replace the same tensor, or one is DoRA.

        Notes
        -----
        If a switch is interrupted, every weight is either in its old or in its new state. `state` names those that have
        not been changed yet, and `repair` or another switch continues.
        """
        target = self._normalise_task(task)
        tensors = self._plans.get(target)
        # A mixture. Its plan is not kept, because there is no limit to their number.
        if tensors is None:
            tensors = self._without_duplicates(self._make_plan(target).tensors)
        # An interrupted write is finished first: the weight may be half old and half new.
        self._finish_writing()
        self._goal = target, frozenset(tensors)

        def change(key: str) -> tuple[str, tuple[Array, _MergedWeight | None]]:
            plan, W = tensors.get(key), self._base_of(key)
            with place(key):
                return key, (W, None) if plan is None else self._merge(key, W, plan, target)

        # Weights are computed in threads, but written one after the other by this one.
        for key, new in Device("cpu", self._threads).map(change, self.state.waiting):
            self._writing[key] = new
            self._finish_writing()

    def replace(self, name: str, adapter: Adapter) -> None:
        """Replace the adapter of a task, for which the model must not be merged.

        Raises
        ------
        OptionError
            There is no such task, or the model is merged for it.
        MismatchError
            The adapter does not fit the model.
        """
        (task,) = self._normalise_task(name)
        if task[0] in dict(self._goal[0]) or self.state.waiting:
            raise OptionError(f"the model is merged for {name}", fix="switch to the base first: switch(None)")
        # A view is read by every switch, and its plan stays.
        if not self._views or adapter is not self._held[name]:
            self._held[name] = adapter if self._views else adapter.load()
            self._add_plan(name)

    @property
    def weights(self) -> dict[str, int]:
        """The weights that some adapter changes, with the bytes that this process has of them."""
        return {key: self._slots[key].nbytes for key in self._hashes}

    def repair(self) -> None:
        """Finish a switch that was interrupted, if there is one."""
        self.switch(dict(self._goal[0]))

    def verify(self) -> None:
        """Check by SHA-256 that the base is the original one, for every weight that some adapter changes.

        Raises
        ------
        MismatchError
            Other code has changed the weights, or a switch was interrupted.
        """
        state = self.state
        if not state.is_complete:
            what = f"a switch was interrupted: {len(state.waiting)} of {state.weights} weights are not changed yet"
            raise MismatchError(what, fix="call repair() first")
        changed = [key for key, digest in self._hashes.items() if hash_rows([self._base_of(key)]) != digest]
        if changed:
            raise MismatchError(
                f"{len(changed)} weights were changed by something else: {', '.join(changed[:3])}",
                fix="load the model again, and make a new Switchboard",
            )

    def bytes(self) -> MemoryUse:
        """The memory in use now, in addition to the model."""
        merged_weights = self._merged.values()
        return MemoryUse(
            {
                name: one.nbytes + sum(extra.tensor.nbytes for extra in one.extra.values())
                for name, one in self._held.items()
                if not self._views
            },
            sum(weight.patch_bytes for weight in merged_weights),
            sum(weight.undo.nbytes for weight in merged_weights if isinstance(weight.undo, np.ndarray)),
            sum(weight.factor_bytes for weight in merged_weights),
        )

    def _normalise_task(self, request: Wanted) -> Task:
        """The task in its normal form: adapters in the order of the constructor, without those of weight 0."""
        weights = {} if request is None else {request: 1.0} if isinstance(request, str) else dict(request)
        for name, weight in weights.items():
            if name not in self._held:
                names = nearest(str(name), self._held) if self._held else "none: there are no adapters"
                raise OptionError(f"no adapter is called {name!r}", fix=f"the nearest names are {names}")
            if not isfinite(weight):
                raise OptionError(f"the weight of {name} is {weight}", fix="give a finite number")
        # In one order, so that the same mixture has the same plan and the same bits however it was written down.
        return tuple((name, float(weights[name])) for name in self._held if weights.get(name))

    def _add_plan(self, name: str) -> None:
        """Plan the merge of one adapter, and remember the digests of the weights that it changes."""
        with place(name):
            merge_plan = self._make_plan(((name, 1.0),))
            tensors = self._without_duplicates(merge_plan.tensors)
            notes = (*merge_plan.notes, *self._check_in_place(tensors, merge_plan.tensors))
        self._plans[((name, 1.0),)] = tensors
        self.notes = tuple(dict.fromkeys([*self.notes, *(f"{name}: {note}" for note in notes)]))
        # Only weights that some adapter changes are written by this class, so only these are checked.
        for key in (key for key in self._slots if key in tensors and key not in self._hashes):
            self._hashes[key] = hash_rows([self._base_of(key)])

    def _make_plan(self, task: Task) -> MergePlan:
        pairs = [(self._held[name], weight) for name, weight in task]
        return plan_merge(pairs, self._base, config=UNTIED, conv1d=self._conv1d)

    def _without_duplicates(self, tensors: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
        """Leave out plans that change the same memory in the same way as another; the plan of an embedding stays."""
        distinct: dict[str, TensorPlan] = {}
        # Embeddings come first, so that of two names for the same memory, the name of the embedding is kept.
        for key in sorted(tensors, key=lambda key: not _is_of_embedding(tensors[key])):
            # A new tensor has no memory yet, so nothing shares it.
            same = [distinct[other] for other in self._sharing.get(key, ()) if other in distinct]
            if not any(have_same_change(tensors[key], one) for one in same):
                distinct[key] = tensors[key]
        return {key: tensor for key, tensor in tensors.items() if key in distinct}

    def _check_in_place(self, tensors: Mapping[str, TensorPlan], meant: Collection[str]) -> list[str]:
        """Refuse plans that cannot be carried out in place, and return notes about the others."""
        notes = []
        for key, tensor in tensors.items():
            if tensor.base is None:
                raise MismatchError(
                    f"it brings {key}, which the model does not have",
                    fix=f"load the model with it; or {LEAVE_EXTRA_OUT}",
                )
            if tensor.shape != tensor.base.shape:
                raise MismatchError(
                    f"{key} would change its shape from {tensor.base.shape} to {tensor.shape}",
                    fix="resize the model's own weight first",
                )
            check_slot_writable(key, self._slots[key])
            shard = self._slots[key].shard
            if shard and not shard.divides(tensor.matrix):
                raise MismatchError(
                    f"{key} is a vector of which each process has a part, so it cannot be changed",
                    fix="leave it out of the adapter, or merge into a model that is not sharded",
                )
            notes += self._check_shared(key, tensor, meant)
        return notes

    def _check_shared(self, key: str, tensor: TensorPlan, meant: Collection[str]) -> list[str]:
        """Refuse plans that would also change a weight that shares its memory, except embeddings with their head.

        Embedding and head may change together if the plan changes the rows of single tokens, which PEFT changes in the
        head too, or if ``meant``, the weights that the adapter changes, contains both.
        """
        sharing = self._sharing[key]
        if not sharing or not tensor.base or not tensor.base.size:
            return []
        # An unmerged adapter changes one of the weights alone, so both may change only if that is intended.
        both = tensor.tokens is not None or all(other in meant for other in sharing)
        if not _is_of_embedding(tensor) or not (both or self._keep_tied):
            raise MismatchError(
                f"{key} shares its numbers with {sharing[0]}, which would change too",
                fix=f"give it numbers of its own (clone the parameter), or leave {key} out of the adapter"
                + ("; keep_tied=True changes both" if _is_of_embedding(tensor) else ""),
            )
        return [f"{sharing[0]} shares the numbers of {key} and changes with it"]

    def _merge(self, key: str, W: Array, plan: TensorPlan, task: Task) -> tuple[Array, _MergedWeight]:
        """W' = round(W + D), for the rows W of the base that this process has, and what restores W."""
        slot, factor_bytes = self._slots[key], 0
        if self._views:
            # The factors of the plan may change before the weight is restored.
            segments = [
                replace(segment, terms=tuple((w, term.load()) for w, term in segment.terms))
                for segment in plan.segments
            ]
            plan, factor_bytes = (
                replace(plan, segments=tuple(segments)),
                sum(t.nbytes for segment in segments for _, t in segment.terms),
            )
        source = _as_whole(slot, W)
        # The norms of DoRA need all rows.
        if slot.shard and any(segment.magnitude for segment in plan.segments):
            source = LazyArray.of(slot.whole_weight(W))
        # `plan.base` reads the memory of the model, which may hold merged numbers by now. W has those of the base.
        merge = prepare_merge(
            replace(plan, base=source), dtype=W.dtype, within=slot.shard and slot.shard.rows_of(plan.matrix)
        )
        replaced = plan.replacement is not None
        # Factors are at hand for every form of update, so all are subtracted.
        recorder = MergeRecorder(merge, hashes=False, fidelity=False, undo=not replaced, against="subtracted")
        merged = _filled(W, recorder.blocks())
        # A patch against unrelated numbers would be as large as the weight, and a copy is faster.
        return merged, _MergedWeight(task, W.copy() if replaced else TensorUndo.of(recorder.record()), factor_bytes)

    def _base_of(self, key: str) -> Array:
        """A weight of the base, or the rows that this process has, restored if it is merged; it is not modified."""
        slot = self._slots[key]
        W = slot.read()
        if key not in self._merged:
            return W
        undo = self._merged[key].undo
        if not isinstance(undo, TensorUndo):
            return undo
        return _filled(
            W, restored_rows(undo, _as_whole(slot, W), within=slot.shard and slot.shard.rows_of(undo.matrix))
        )

    def _finish_writing(self) -> None:
        """Write the weights that are due. If this is interrupted, it can be repeated with the same result."""
        for key, (array, merged) in list(self._writing.items()):
            self._slots[key].write(array)
            if merged is None:
                self._merged.pop(key, None)
            else:
                self._merged[key] = merged
            del self._writing[key]


def _is_of_embedding(tensor: TensorPlan) -> bool:
    """Whether all updates of a plan belong to an embedding; also true if it has none."""
    return all(term.layout.kind == "embedding" for segment in tensor.segments for _, term in segment.terms)


def _as_whole(slot: WeightSlot, own: Array) -> LazyArray:
    """The whole weight, of which only the rows of this process can be read."""
    return slot.shard.as_part(own) if slot.shard else LazyArray.of(own)


def _filled(like: Array, blocks: Iterable[Array]) -> Array:
    """A new array in the shape of another one, from blocks of its rows."""
    result = np.empty(like.size, like.dtype)
    first = 0
    for rows in blocks:
        result[first : first + rows.size] = rows.reshape(-1)
        first += rows.size
    assert first == result.size
    return result.reshape(like.shape)
