"""Switchboard: one resident base, many tasks, no drift."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from math import isfinite
from typing import TYPE_CHECKING, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.names import nearest
from loralens.errors import MismatchError, OptionError, place
from loralens.linalg.device import Device
from loralens.merging.plan import Plan, TensorPlan
from loralens.merging.planning import plan
from loralens.merging.record import feed
from loralens.merging.resident.resident import Merged, Task, merged, restored
from loralens.merging.resident.slots import Slot, check_writable, lazy, slots_of, stores_conv1d
from loralens.merging.tying import alike

if TYPE_CHECKING:  # 1.4 s: only for the type
    from torch import nn

Wanted = str | Mapping[str, float] | None
UNTIED = {"tie_word_embeddings": False}  # what shares its numbers is seen here, not told by a configuration
Made = tuple[Array, Merged | None]  # the new numbers of a weight, and what undoes them; None for the base


@final
@dataclass(frozen=True, slots=True)
class State:
    """Where a switchboard stands.

    Attributes
    ----------
    task : mapping of str to float
        What the weights are merged for, or are on the way to; empty for the base.
    waiting : tuple of str
        Weights that are not there yet, since a switch was interrupted.
    weights : int
        Weights that some adapter changes.
    """

    task: Mapping[str, float]
    waiting: tuple[str, ...]
    weights: int

    @property
    def whole(self) -> bool:
        """Whether all weights are where they should be."""
        return not self.waiting

    def __str__(self) -> str:
        name = " + ".join(f"{weight:g} × {name}" for name, weight in self.task.items()) or "the base"
        if self.whole:
            return f"merged for {name}" if self.task else "the base"
        done = self.weights - len(self.waiting)
        return f"interrupted on the way to {name}: {done} of {self.weights} weights are there; repair() finishes it"


@final
@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that a switchboard holds beside the model.

    Attributes
    ----------
    factors : mapping of str to int
        Of each adapter, everything it carries included.
    patch : int
        What gives the base back from the current task.
    copies : int
        Weights of the base that the current task replaces instead of adding to them.
    """

    factors: Mapping[str, int]
    patch: int
    copies: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.factors.values()) + self.patch + self.copies


@final
class Switchboard:
    """One model in memory, merged for one task at a time, its weights changed in place.

    Parameters
    ----------
    model : torch module, or mapping of str to array
        Of any float dtype; arrays must be writable. Parameters on another device than the CPU are copied over and back,
        one at a time. Under training or `load_state_dict` the base changes, and what was merged cannot be undone.
    adapters : mapping of str to Adapter
        The tasks. Pairs of every kind, LyCORIS products, DoRA (alone, not in a mix), biases, token rows and saved
        modules are merged as `loralens merge` does; weights and extras that the model has no place for are refused.
    conv1d : bool or None
        Linear weights are stored (in, out); by default as the layers of a torch module say, else false.
    keep_tied : bool
        Let a head that shares the embedding's numbers change with it where the unmerged adapter leaves it as it is.
    threads : int
        Weights worked on at a time. More than one pays only where BLAS itself uses one; the bits are the same.

    Attributes
    ----------
    notes : tuple of str
        What else there is to know of the tasks.

    Raises
    ------
    MismatchError
        An adapter does not fit the model, or would change a weight that others share.

    Notes
    -----
    Taking D away again does not give W back: rounding gave several W one W'. So for every weight of the current task a
    patch is kept, W = patch(round(W' − D)), 0.05 to 0.4 bits a weight, and the base after any number of switches is the
    original, bit for bit. A switch costs two products of each adapted weight and the patch; the forward pass costs
    what it costs without adapters. One weight at a time (one a thread) is held twice meanwhile.
    """

    def __init__(
        self,
        model: "nn.Module | Mapping[str, Array]",
        adapters: Mapping[str, Adapter],
        *,
        conv1d: bool | None = None,
        keep_tied: bool = False,
        threads: int = 1,
    ) -> None:
        self._slots: dict[str, Slot] = slots_of(model)
        self._base = {key: lazy(slot) for key, slot in self._slots.items()}
        self._conv1d = stores_conv1d(model) if conv1d is None else conv1d
        self._threads, self._keep_tied = threads, keep_tied
        self._adapters = {name: _loaded(adapter) for name, adapter in adapters.items()}
        self._merged: dict[str, Merged] = {}
        self._goal: tuple[Task, frozenset[str]] = ((), frozenset())  # a task, and the weights that it changes
        self._writing: tuple[str, Made] | None = None  # the journal: a weight being written, and what with
        self._plans: dict[Task, Mapping[str, TensorPlan]] = {}
        notes: list[str] = []
        for name in adapters:
            with place(name):
                found = self._plan(((name, 1.0),))
                tensors = self._once(found.tensors)
                notes += [f"{name}: {note}" for note in (*found.notes, *self._check(tensors, found.tensors))]
            self._plans[((name, 1.0),)] = tensors
        self.notes = tuple(dict.fromkeys(notes))
        keys = {key for tensors in self._plans.values() for key in tensors}
        self._hashes = {key: _hash(self._slots[key].read()) for key in self._slots if key in keys}

    @property
    def state(self) -> State:
        """What the weights are merged for, and which of them are not there yet."""
        waiting = tuple(key for key in self._hashes if self._task_of(key) != self._task_for(key))
        return State(dict(self._goal[0]), waiting, len(self._hashes))

    def switch(self, task: Wanted) -> None:
        """Merge the model for another task.

        Parameters
        ----------
        task : str, mapping of str to float, or None
            The name of an adapter; several, and how strongly each counts; or the base itself.

        Raises
        ------
        OptionError
            No adapter of that name, or a weight that is no finite number.
        MismatchError
            A mix of adapters that cannot be mixed: two that replace one tensor, or DoRA beside another.

        Notes
        -----
        Whatever stops it half way, every weight is either as before or as wanted, `state` names those that are not
        there yet, and `repair`, or another switch, goes on from there.
        """
        wanted = self._task(task)
        tensors = self._tensors(wanted)
        self._settle()
        self._goal = wanted, frozenset(tensors)
        keys = [key for key in self._hashes if self._task_of(key) != self._task_for(key)]

        def make(key: str) -> tuple[str, Made]:
            with place(key):
                return key, self._made(key, tensors.get(key), wanted)

        for made in Device("cpu", self._threads).map(make, keys):
            self._writing = made
            self._settle()

    def repair(self) -> None:
        """Finish a switch that was interrupted; nothing to do where none was."""
        self.switch(dict(self._goal[0]))

    def verify(self) -> None:
        """Check that the base is the one that was given, by SHA-256, every weight that some adapter changes.

        Raises
        ------
        MismatchError
            It is not: the weights were changed from outside. Or a switch was interrupted.
        """
        state = self.state
        if not state.whole:
            raise MismatchError(str(state), fix="call repair() first")
        changed = [key for key, digest in self._hashes.items() if _hash(self._base_of(key)) != digest]
        if changed:
            raise MismatchError(
                f"{len(changed)} weights are not those that were given: {', '.join(changed[:3])}",
                fix="something else changed them: load the model again",
            )

    def bytes(self) -> Held:
        """What is held beside the model now."""
        kept = self._merged.values()
        return Held(
            {name: _nbytes(adapter) for name, adapter in self._adapters.items()},
            sum(one.patch_bytes for one in kept),
            sum(one.copy_bytes for one in kept),
        )

    def _task(self, wanted: Wanted) -> Task:
        """A task in the one form that it has: adapters in the order in which they were given, none that counts 0."""
        asked = {} if wanted is None else {wanted: 1.0} if isinstance(wanted, str) else dict(wanted)
        for name, weight in asked.items():
            if name not in self._adapters:
                names = nearest(str(name), self._adapters) if self._adapters else "none: there are no adapters"
                raise OptionError(f"no adapter is called {name!r}", fix=f"the nearest names are {names}")
            if not isfinite(weight):
                raise OptionError(f"{name} is to count {weight} times", fix="give a finite number")
        return tuple((name, float(asked[name])) for name in self._adapters if asked.get(name))

    def _tensors(self, task: Task) -> Mapping[str, TensorPlan]:
        if not task:
            return {}
        return self._plans[task] if task in self._plans else self._once(self._plan(task).tensors)

    def _plan(self, task: Task) -> Plan:
        pairs = [(self._adapters[name], weight) for name, weight in task]
        return plan(pairs, self._base, config=UNTIED, conv1d=self._conv1d)

    def _once(self, tensors: Mapping[str, TensorPlan]) -> dict[str, TensorPlan]:
        """The plans without those that change shared numbers as another one does; that of an embedding stays."""
        kept: dict[str, TensorPlan] = {}
        for key in sorted(tensors, key=lambda key: not _of_embedding(tensors[key])):
            address = self._slots[key].address if key in self._slots else None
            same = (
                one for other, one in kept.items() if other in self._slots and self._slots[other].address == address
            )
            if not any(alike(tensors[key], one) for one in same):
                kept[key] = tensors[key]
        return {key: tensor for key, tensor in tensors.items() if key in kept}

    def _check(self, tensors: Mapping[str, TensorPlan], meant: Collection[str]) -> list[str]:
        """Refuse what cannot be done in place; what there is to say of the rest."""
        notes = []
        for key, tensor in tensors.items():
            if tensor.base is None:
                raise MismatchError(
                    f"it brings {key}, which the model has not",
                    fix="load the model with it, or leave it out: loralens convert --drop-extra",
                )
            if tensor.shape != tensor.base.shape:
                raise MismatchError(
                    f"{key} would change its shape from {tensor.base.shape} to {tensor.shape}",
                    fix="resize the model's own weight first",
                )
            check_writable(key, self._slots[key])
            notes += self._shared(key, tensor, meant)
        return notes

    def _shared(self, key: str, tensor: TensorPlan, meant: Collection[str]) -> list[str]:
        """Other names of the same memory: an embedding may take its head along where that is meant, nothing else may.

        PEFT trains single tokens in the head too; of the others the adapter says itself which weights are ``meant``.
        """
        address = self._slots[key].address
        others = [other for other, slot in self._slots.items() if other != key and slot.address == address]
        if not others or not tensor.base or not tensor.base.size:
            return []
        both = tensor.tokens is not None or all(other in meant for other in others)
        if not _of_embedding(tensor) or not (both or self._keep_tied):
            raise MismatchError(
                f"{key} shares its numbers with {others[0]}, which would change too",
                fix=f"give it numbers of its own (clone the parameter), or leave {key} out of the adapter"
                + ("; keep_tied=True changes both" if _of_embedding(tensor) else ""),
            )
        return [f"{others[0]} shares the numbers of {key} and changes with it"]

    def _task_of(self, key: str) -> Task:
        """What a weight is merged for."""
        return self._merged[key].task if key in self._merged else ()

    def _task_for(self, key: str) -> Task:
        """What it should be merged for."""
        task, touched = self._goal
        return task if key in touched else ()

    def _base_of(self, key: str) -> Array:
        """A weight of the base, as it can be had now."""
        here = self._slots[key].read()
        return restored(here, self._merged[key]) if key in self._merged else here

    def _made(self, key: str, tensor: TensorPlan | None, task: Task) -> Made:
        """The new numbers of a weight; nothing is changed yet."""
        W = self._base_of(key)
        return (W, None) if tensor is None else merged(W, tensor, task)

    def _settle(self) -> None:
        """Write what the journal holds: as often as it is interrupted, with the same result."""
        if self._writing is None:
            return
        key, (array, undo) = self._writing
        self._slots[key].write(array)
        if undo is None:
            self._merged.pop(key, None)
        else:
            self._merged[key] = undo
        self._writing = None


def _of_embedding(tensor: TensorPlan) -> bool:
    """Whether all that is added is of an embedding, or nothing is added."""
    return all(term.layout.kind == "embedding" for slab in tensor.slabs for _, term in slab.terms)


def _loaded(adapter: Adapter) -> Adapter:
    """The adapter with everything it carries in memory."""
    extra = {key: replace(one, tensor=LazyArray.of(one.tensor.read())) for key, one in adapter.extra.items()}
    return replace(adapter.load(), extra=extra)


def _nbytes(adapter: Adapter) -> int:
    return adapter.nbytes + sum(one.tensor.nbytes for one in adapter.extra.values())


def _hash(array: Array) -> bytes:
    digest = sha256()
    feed(digest, array)
    return digest.digest()
