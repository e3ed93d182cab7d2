"""Making the `MergePlan` of a merge from adapters and a base model.

Every tensor of an adapter is planned, reported as missing, or refused with an error; none is ignored silently.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import TOO_LARGE
from loralens.core.matching import Match, Shape
from loralens.core.structured import Update, Updates
from loralens.core.weights import Piece, Weight, Weights, share_of, weights_of
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, OptionError, place
from loralens.merging.extras import Changes, find_changes
from loralens.merging.heads import head_fields
from loralens.merging.plan import Axis, Magnitude, MergePlan, Slab, TensorPlan, as_matrix
from loralens.merging.tied_weights import Tied

SINGLE = 2.0**128  # the smallest power of two beyond the range of float32
CHANGED_BASE = {  # code of a finding of a reader → the reason why the update cannot be added to the original base
    "mutated-base": "it was trained on a changed base, so scale·B·A is not the change of the original base",
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
    """The changes of one stored tensor while adapters are added to the plan."""

    slabs: dict[int, Slab] = field(default_factory=dict)  # by their first row
    changes: Changes = field(default_factory=Changes)
    experts: bool = False  # whether the tensor is a stack of experts that are adapted one by one


def plan_merge(
    adapters: Sequence[tuple[Adapter, float]],
    base: Mapping[str, LazyArray],
    *,
    config: Mapping[str, Any] | None = None,
    conv1d: bool = False,
    allow_missing: bool = False,
    untie: bool | None = None,
    dtype: str | None = None,
    scales: Mapping[str, LazyArray] | None = None,
) -> MergePlan:
    """Plan the merge of adapters into a base model.

    Parameters
    ----------
    adapters : sequence of (Adapter, float)
        Adapters and their weights w: W' = W + Σ w·ΔW. For a DoRA adapter, w multiplies ΔW, and the magnitude is used
        unchanged.
    base : mapping of str to LazyArray
        Key → tensor of the base checkpoint.
    config : mapping or None
        ``config.json`` of the base.
    conv1d : bool
        Whether the base stores linear weights as (in, out).
    allow_missing : bool
        Leave out modules and tensors that have no place in the base.
    untie : bool or None
        Whether weights that share the numbers of the embedding (usually the head) become separate weights, or stay tied
        and change with the embedding. None chooses what makes the merged model equivalent to the unmerged adapter.
    dtype : str or None
        The dtype in which the model is written; it decides how many bytes untying adds.
    scales : mapping of str to LazyArray, or None
        The scales of float8 weights, by the key of the weight.

    Raises
    ------
    MismatchError
        A module or tensor has no place in the base, two adapters replace the same tensor, or a tensor has a DoRA update
        and another update.
    FormatError
        An adapter cannot be added to the original base, or has tensors that were not understood.
    """
    # Adapters may name a copy that the base does not store, so every copy gets the tensor of the embedding.
    tied = Tied.of(base, config or {})
    base = tied.ties.with_copies(base)
    drafts: dict[str, _Draft] = {}
    matches: list[Match] = []
    missing: list[str] = []
    notes: list[str] = []
    for adapter, strength in adapters:
        _check_mergeable(adapter)
        weights = _find_weights(adapter.modules, base, conv1d=conv1d, allow_missing=allow_missing)
        matches.append(weights.match)
        missing += [name for name in adapter if name not in weights.modules]
        extra_changes = find_changes(adapter, strength, weights, base)
        touched = {
            *extra_changes.changes,
            *(piece.key for weight in weights.modules.values() for piece in weight.pieces),
        }
        for name, weight in weights.modules.items():
            for piece in weight.pieces:
                # An update of the embedding may be meant for its copies too.
                for key in tied.target_keys(adapter, piece.key, touched):
                    target = piece._replace(key=key)
                    _add_update(drafts.setdefault(key, _Draft()), name, weight, target, adapter.modules[name], strength)
        missing += extra_changes.missing
        notes += extra_changes.notes
        for home, changes in extra_changes.changes.items():
            for key in tied.target_keys(adapter, home, touched, changes):
                _add_changes(drafts.setdefault(key, _Draft()), key, changes)
    # Missing tensors are reported after all adapters were read, so that one message names all of them.
    if missing and not allow_missing:
        raise MismatchError(
            f"{len(missing)} tensors have no place in the base: {', '.join(missing[:3])}",
            fix="give the base that the adapter was trained on, or leave them out with --allow-missing",
        )
    changed = {key: _plan_tensor(key, draft, base, (scales or {}).get(key)) for key, draft in drafts.items()}
    tying = tied.decide(changed, untie=untie, dtype=dtype)
    changed = tying.plans
    notes += [
        f"{key} {tensor.shape} is new: the base has no such tensor"
        for key, tensor in changed.items()
        # Copies and biases that untying writes are reported by their own note.
        if tensor.base is None and key not in tied.ties.copies and key not in tied.ties.biases
    ]
    heads, labels = head_fields(changed, [adapter for adapter, _ in adapters], config or {})
    fields = {**_vocabulary_fields(changed, config), **tying.config, **labels}
    return MergePlan(changed, tuple(matches), tuple(missing), (*notes, *tying.notes, *heads), fields)


def _check_mergeable(adapter: Adapter) -> None:
    for finding in adapter.findings:
        if finding.code in CHANGED_BASE:
            raise FormatError(f"cannot be merged: {CHANGED_BASE[finding.code]}", fix=finding.fix or "serve it unmerged")
    for name, module in adapter.items():
        # `not <` also refuses NaN.
        if not abs(module.scale) < SINGLE:
            raise FormatError(
                f"{name}: its scale {module.scale:g} is beyond float32, in which an update is added to a weight",
                fix=TOO_LARGE,
            )


def _find_weights(modules: Updates, base: Mapping[str, LazyArray], *, conv1d: bool, allow_missing: bool) -> Weights:
    try:
        return weights_of(modules, base, conv1d=conv1d, allow_missing=allow_missing)
    except MismatchError as error:
        # weights_of also serves verbs without the option --allow-missing, so its advice is extended here.
        advice = MismatchError(error.what, fix=f"{error.fix}; or leave them out with --allow-missing")
        advice.where = error.where
        raise advice from error


def _add_update(draft: _Draft, name: str, weight: Weight, piece: Piece, module: Update, strength: float) -> None:
    """Add the update of one module to the slab of its rows; updates of several adapters there form one sum."""
    if module.layout.kind == "conv" and module.layout.groups > 1:
        raise MismatchError(
            f"{name}: the update reads all input channels, but the weight of a grouped convolution has only some",
            fix=LEAVE_OUT,
        )
    # As soon as one expert is adapted alone, the whole stack is treated as a matrix of all rows.
    draft.experts |= piece.experts
    start, stop = piece.start, piece.start + piece.rows
    if any(
        # The same range of rows may get several updates, but a slab cannot hold ranges that overlap only in part.
        slab.start < stop and start < slab.stop and (slab.start, slab.stop) != (start, stop)
        for slab in draft.slabs.values()
    ):
        raise MismatchError(
            f"{name} adapts some rows of {piece.key}, and another adapter adapts a range that overlaps with them",
            fix="merge one of the adapters first, and the other into the result",
        )
    with place(name):
        term = strength, share_of(module, weight, piece)
    # Several pieces of one module are reported separately, so each needs a name of its own.
    name = f"{name} in {piece.key}" if len(weight.pieces) > 1 else name
    rows_slab = draft.slabs.get(start, Slab(name, start, stop, (), weight.transposed))
    draft.slabs[start] = replace(rows_slab, terms=(*rows_slab.terms, term))


def _add_changes(draft: _Draft, key: str, changes: Changes) -> None:
    """Add the other changes that an adapter makes to a tensor."""
    ours = draft.changes
    # Differences of several adapters add up, but a tensor can be replaced or scaled by one adapter only.
    for name in ("replacement", "tokens", "magnitude"):
        if getattr(ours, name) is not None and getattr(changes, name) is not None:
            raise MismatchError(
                f"two adapters give a {name} for {key}",
                fix="merge one of the adapters first, and the other into the result",
            )
    draft.changes = Changes(
        replacement=ours.replacement or changes.replacement,
        tokens=ours.tokens or changes.tokens,
        magnitude=ours.magnitude or changes.magnitude,
        added=(*ours.added, *changes.added),
    )


def _plan_tensor(key: str, draft: _Draft, base: Mapping[str, LazyArray], scale: LazyArray | None) -> TensorPlan:
    changes = draft.changes
    # The scales belong to the numbers of the base, not to those that replace them.
    if scale is not None and (changes.replacement is not None or changes.tokens):
        raise MismatchError(
            f"{key} is float8 with scales, but the adapter replaces some of its numbers",
            fix="give the base in a 16-bit dtype",
        )
    source = changes.replacement or base[key]
    matrix = as_matrix(source.shape, experts=draft.experts)
    if changes.tokens and max(changes.tokens.indices, default=0) >= matrix[0]:
        raise MismatchError(
            f"{key} has {matrix[0]} rows, but the adapter has a row for token {max(changes.tokens.indices)}",
            fix="give the base that the adapter was trained on",
        )
    slabs = dict(draft.slabs)
    if changes.added:
        first_slab = slabs.get(0, Slab(key, 0, matrix[0], ()))
        if first_slab.transposed:
            raise MismatchError(
                f"{key} is stored as (in, out), but the adapter has both a pair and a full difference for it",
                fix="leave one of them out",
            )
        # A full difference covers all rows, so it joins the slab that begins at row 0.
        slabs[0] = replace(first_slab, terms=(*first_slab.terms, *changes.added))
    if changes.magnitude:
        slabs = {start: _add_magnitude(slab, changes.magnitude, source.shape) for start, slab in slabs.items()}
    ordered = tuple(slabs[start] for start in sorted(slabs))
    return TensorPlan(key, base.get(key), matrix, ordered, changes.replacement, changes.tokens, scale)


def _add_magnitude(slab: Slab, lengths: tuple[LazyArray | None, bool], stored: Shape) -> Slab:
    """Add DoRA's magnitude to a slab, on the axis on which the tensor is stored.

    A convolution with a magnitude per input has one number per channel. LyCORIS stores it as (1, in, 1…) and takes the
    norm over outputs and kernel; ComfyUI computes the same.
    """
    tensor, by_output = lengths
    if len(slab.terms) > 1:
        raise MismatchError(
            f"{slab.module} has a DoRA update in one adapter and an update in another, which cannot be added",
            fix="merge the DoRA adapter alone first, and the others into the result",
        )
    # A magnitude per output runs along the rows of a weight stored (out, in), and along the columns of one stored (in,
    # out).
    axis: Axis = "rows" if by_output != slab.transposed else "columns"
    size = slab.stop - slab.start if axis == "rows" else slab.terms[0][1].shape[0 if by_output else 1]
    if tensor is None:
        return replace(slab, magnitude=Magnitude(None, axis))
    # The columns of a convolution are (in, kernel) flattened, so a channel has several of them.
    channels = stored[1] if axis == "columns" and len(stored) > 2 and not slab.transposed else size
    if tensor.size not in (size, channels):
        raise OptionError(
            f"{slab.module}: {tensor.size} magnitudes for {channels} vectors",
            fix="save the adapter again from training",
        )
    return replace(slab, magnitude=Magnitude(tensor.reshape(tensor.size), axis))


def _vocabulary_fields(changed: Mapping[str, TensorPlan], config: Mapping[str, Any] | None) -> dict[str, object]:
    """Fields of the configuration that change if the adapter replaces the embedding by one of another size."""
    if not config or "vocab_size" not in config:
        return {}
    for tensor in changed.values():
        if tensor.base is not None and tensor.replacement is not None and tensor.base.shape != tensor.shape:
            # If only the number of rows differs, the vocabulary has changed. Any other shape belongs to another model.
            if tensor.base.shape[0] == config["vocab_size"] and tensor.base.shape[1:] == tensor.shape[1:]:
                return {"vocab_size": tensor.shape[0]}
            raise MismatchError(
                f"{tensor.key}: {tensor.shape} cannot replace {tensor.base.shape}",
                fix="give the base that the adapter was trained on",
            )
    return {}
