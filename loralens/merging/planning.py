"""From adapters and a base model to the `Plan` of their merge; nothing an adapter carries is left without a word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.naming.matching import Match, Shape
from loralens.core.structured import Update, Updates
from loralens.core.weights import Piece, Weight, Weights, share_of, weights_of
from loralens.errors import FormatError, MismatchError, OptionError, place
from loralens.merging.extras import Changes, changes_of
from loralens.merging.heads import head_fields
from loralens.merging.plan import Magnitude, Plan, Slab, TensorPlan, as_matrix
from loralens.merging.tying import Tied

SINGLE = 2.0**128  # the first number that float32 does not hold
CHANGED_BASE = {  # finding of a reader → why its update cannot be added to the original base
    "mutated-base": "it was trained on a changed base, so scale·B·A is not its change",
    "kasa-config": "KaSA truncates the base weight too",
    "layer-replication": "its layers index a replicated stack",
    "alora-invocation-tokens": "aLoRA acts only after its invocation tokens",
    "arrow-config": "Arrow chooses between adapters at run time",
    "use-qalora": "QALoRA's A acts on pooled inputs",
    "pair-ignored": "it holds a pair and a full tensor for one module",
}


@final
@dataclass(slots=True)
class _Draft:
    """The plan of one stored tensor while it is drawn up."""

    slabs: dict[int, Slab] = field(default_factory=dict)  # by their first row
    changes: Changes = field(default_factory=Changes)
    experts: bool = False  # it is a stack of them, adapted one by one


def plan(
    adapters: Sequence[tuple[Adapter, float]],
    base: Mapping[str, LazyArray],
    *,
    config: Mapping[str, Any] | None = None,
    conv1d: bool = False,
    allow_missing: bool = False,
    untie: bool | None = None,
    dtype: str | None = None,
    scales: Mapping[str, LazyArray] | None = None,
) -> Plan:
    """What merging the adapters into the base changes.

    Parameters
    ----------
    adapters : sequence of (Adapter, float)
        And how strongly each counts: W' = W + Σ w·ΔW. Of a DoRA adapter ΔW counts w times, the magnitude as it is.
    base : mapping of str to LazyArray
        Key → tensor of the base checkpoint.
    config : mapping or None
        ``config.json`` of the base.
    conv1d : bool
        The base stores linear weights (in, out).
    allow_missing : bool
        Leave out what has no place in the base.
    untie : bool or None
        Whether weights that share the embedding's numbers (the head, as a rule) become weights of their own, or stay
        tied and change with it; None: whatever makes the merged model do what the unmerged adapter does.
    dtype : str or None
        In which the model is written: for the bytes that untying costs.
    scales : mapping of str to LazyArray, or None
        What each number of some float8 weights is multiplied by, by their key.

    Raises
    ------
    MismatchError
        A module or tensor has no place in the base; two adapters replace one tensor, or one is DoRA where another adds.
    FormatError
        An adapter that is no sum with the original base, or holds what is not understood.
    """
    tied = Tied.of(base, config or {})
    base = tied.shown(base)
    drafts: dict[str, _Draft] = {}
    matches: list[Match] = []
    missing: list[str] = []
    notes: list[str] = []
    for adapter, strength in adapters:
        _check(adapter)
        weights = _weights(adapter.modules, base, conv1d=conv1d, allow_missing=allow_missing)
        matches.append(weights.match)
        missing += [name for name in adapter if name not in weights.modules]
        found = changes_of(adapter, strength, weights, base)
        touched = {*found.changes, *(piece.key for weight in weights.modules.values() for piece in weight.pieces)}
        for name, weight in weights.modules.items():
            for piece in weight.pieces:
                for key in tied.meant(adapter, piece.key, touched):
                    here = piece._replace(key=key)
                    _add(drafts.setdefault(key, _Draft()), name, weight, here, adapter.modules[name], strength)
        missing += found.missing
        notes += found.notes
        for home, changes in found.changes.items():
            for key in tied.meant(adapter, home, touched, changes):
                _change(drafts.setdefault(key, _Draft()), key, changes)
    if missing and not allow_missing:
        raise MismatchError(
            f"{len(missing)} tensors have no place in the base: {', '.join(missing[:3])}",
            fix="give the base it was trained on, or leave them out with --allow-missing",
        )
    changed = {key: _tensor(key, draft, base, (scales or {}).get(key)) for key, draft in drafts.items()}
    settled = tied.settled(changed, untie=untie, dtype=dtype)
    changed = settled.plans
    notes += [
        f"{key} {tensor.shape} is new: the base has no such tensor"
        for key, tensor in changed.items()
        if tensor.base is None and key not in tied.ties.copies and key not in tied.ties.biases
    ]
    heads, labels = head_fields(changed, [adapter for adapter, _ in adapters], config or {})
    return Plan(
        changed,
        tuple(matches),
        tuple(missing),
        (*notes, *settled.notes, *heads),
        {**_resized(changed, config), **settled.config, **labels},
    )


def _check(adapter: Adapter) -> None:
    for finding in adapter.findings:
        if finding.code in CHANGED_BASE:
            raise FormatError(f"cannot be merged: {CHANGED_BASE[finding.code]}", fix=finding.fix or "serve it unmerged")
    for name, module in adapter.items():
        if not abs(module.scale) < SINGLE:
            raise FormatError(
                f"{name}: its scale {module.scale:g} is beyond float32, in which an update is added to a weight",
                fix="correct α or the scale in its configuration, or give --scale where it says none",
            )


def _weights(modules: Updates, base: Mapping[str, LazyArray], *, conv1d: bool, allow_missing: bool) -> Weights:
    try:
        return weights_of(modules, base, conv1d=conv1d, allow_missing=allow_missing)
    except MismatchError as error:
        told = MismatchError(error.what, fix=f"{error.fix}; or leave them out with --allow-missing")
        told.where = error.where
        raise told from error


def _add(draft: _Draft, name: str, weight: Weight, piece: Piece, module: Update, strength: float) -> None:
    """Add the update of one module to the slab of its rows: several adapters there become one sum."""
    if module.layout.kind == "conv" and module.layout.groups > 1:
        raise MismatchError(
            f"{name}: the update of a grouped convolution reads all input channels and fits no weight",
            fix="leave it out with --modules",
        )
    draft.experts |= piece.experts
    start, stop = piece.start, piece.start + piece.rows
    if any(
        slab.start < stop and start < slab.stop and (slab.start, slab.stop) != (start, stop)
        for slab in draft.slabs.values()
    ):
        raise MismatchError(
            f"{name} adapts some rows of {piece.key}, and another adapter these and more",
            fix="merge one of the adapters first, and the other into the result",
        )
    with place(name):
        term = strength, share_of(module, weight, piece)
    name = f"{name} in {piece.key}" if len(weight.pieces) > 1 else name
    here = draft.slabs.get(start, Slab(name, start, stop, (), weight.transposed))
    draft.slabs[start] = replace(here, terms=(*here.terms, term))


def _change(draft: _Draft, key: str, changes: Changes) -> None:
    """Take over what else an adapter says of a tensor."""
    ours = draft.changes
    for name in ("replacement", "tokens", "magnitude"):
        if getattr(ours, name) is not None and getattr(changes, name) is not None:
            raise MismatchError(
                f"two adapters give a {name} for {key}", fix="merge one of them, or leave it out with --modules"
            )
    draft.changes = Changes(
        replacement=ours.replacement or changes.replacement,
        tokens=ours.tokens or changes.tokens,
        magnitude=ours.magnitude or changes.magnitude,
        added=(*ours.added, *changes.added),
    )


def _tensor(key: str, draft: _Draft, base: Mapping[str, LazyArray], scale: LazyArray | None) -> TensorPlan:
    changes = draft.changes
    if scale is not None and (changes.replacement is not None or changes.tokens):
        raise MismatchError(
            f"{key} is float8 with scales, and the adapter replaces numbers of it",
            fix="give a 16-bit sibling of the base",
        )
    source = changes.replacement or base[key]
    matrix = as_matrix(source.shape, experts=draft.experts)
    if changes.tokens and max(changes.tokens.indices, default=0) >= matrix[0]:
        raise MismatchError(
            f"{key} has {matrix[0]} rows, and token {max(changes.tokens.indices)} was trained",
            fix="give the base it was trained on",
        )
    slabs = dict(draft.slabs)
    if changes.added:
        whole = Slab(key, 0, matrix[0], ())
        here = slabs.get(0, whole)
        if here.transposed:
            raise MismatchError(
                f"{key} is stored (in, out), and a full difference beside a pair is not", fix="leave one of them out"
            )
        slabs[0] = replace(here, terms=(*here.terms, *changes.added))
    if changes.magnitude:
        slabs = {start: _dora(slab, changes.magnitude, source.shape) for start, slab in slabs.items()}
    return TensorPlan(
        key,
        base.get(key),
        matrix,
        tuple(slabs[start] for start in sorted(slabs)),
        changes.replacement,
        changes.tokens,
        scale,
    )


def _dora(slab: Slab, lengths: tuple[LazyArray | None, bool], stored: Shape) -> Slab:
    """The slab with its magnitude on the axis that it has as stored; of a convolution by input, one a channel.

    LyCORIS has one number an input channel there, (1, in, 1…), whose norm runs over outputs and kernel; ComfyUI
    computes the same.
    """
    tensor, by_output = lengths
    if len(slab.terms) > 1:
        raise MismatchError(
            f"{slab.module} is DoRA in one adapter and adapted by another: there is no order in which both hold",
            fix="merge the DoRA adapter alone first, and the others into the result",
        )
    axis = "rows" if by_output != slab.transposed else "columns"
    size = slab.stop - slab.start if axis == "rows" else slab.terms[0][1].shape[0 if by_output else 1]
    if tensor is None:
        return replace(slab, magnitude=Magnitude(None, axis))  # type: ignore[arg-type]
    channels = stored[1] if axis == "columns" and len(stored) > 2 and not slab.transposed else size
    if tensor.size not in (size, channels):
        raise OptionError(
            f"{slab.module}: {tensor.size} magnitudes for {channels} vectors",
            fix="save the adapter again from training",
        )
    return replace(slab, magnitude=Magnitude(tensor.reshape(tensor.size), axis))  # type: ignore[arg-type]


def _resized(changed: Mapping[str, TensorPlan], config: Mapping[str, Any] | None) -> dict[str, object]:
    """Fields of the configuration that a replaced embedding of another size changes."""
    if not config or "vocab_size" not in config:
        return {}
    for tensor in changed.values():
        if tensor.base is not None and tensor.replacement is not None and tensor.base.shape != tensor.shape:
            if tensor.base.shape[0] == config["vocab_size"] and tensor.base.shape[1:] == tensor.shape[1:]:
                return {"vocab_size": tensor.shape[0]}
            raise MismatchError(
                f"{tensor.key}: {tensor.shape} is to replace {tensor.base.shape}",
                fix="give the base it was trained on",
            )
    return {}
