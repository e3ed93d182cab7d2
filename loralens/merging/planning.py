"""Making the `MergePlan` of a merge from adapters and a base model.

Every tensor of an adapter is planned, reported as missing, or refused with an error; none is ignored silently.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Self, TypeVar, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import TOO_LARGE, LowRank
from loralens.core.matching import Match, Shape
from loralens.core.structured import Update, Updates
from loralens.core.weights import Piece, Weight, Weights, share_of, weights_of
from loralens.errors import LEAVE_OUT, FormatError, MismatchError, OptionError, place
from loralens.merging.changes import Changes, find_changes, head_fields, recast_dtype
from loralens.merging.merge_plan import (
    Axis,
    Magnitude,
    MergePlan,
    Segment,
    TensorPlan,
    Weighted,
    as_matrix,
    have_same_values,
)

Held = TypeVar("Held")  # tensors, or their shapes

# Ends of the names of transformers' classes that have a head for tokens.
HEADED = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining")
EMBEDDINGS = (  # ends of keys of embeddings; the first one that belongs to exactly one key is used
    "shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight",
    "embed_in.weight",
)  # fmt: skip
# Embeddings of BERT and similar models, whose heads are found by `MASKED`.
ENCODERS = (".embeddings.word_embeddings.weight", ".embeddings.tok_embeddings.weight")
# For masked language models: the key of a tensor that is always stored, the head that belongs to it, and the key that
# stores the bias of the head (empty if the head has no separate bias).
MASKED = (
    ("cls.predictions.transform.dense.weight", "cls.predictions.decoder", "cls.predictions.bias"),
    ("predictions.dense.weight", "predictions.decoder", "predictions.bias"),  # ALBERT
    ("lm_head.dense.weight", "lm_head.decoder", "lm_head.bias"),  # RoBERTa
    ("generator_predictions.dense.weight", "generator_lm_head", ""),  # ELECTRA
    ("vocab_transform.weight", "vocab_projector", ""),  # DistilBERT
    ("head.dense.weight", "decoder", ""),  # ModernBERT
)
UNBIASED = ("esm", "gte")  # model types whose decoder has no bias, although their names are those of RoBERTa
HEADS = {  # model type → key of its head, if that is not lm_head.weight
    "whisper": "proj_out.weight",
    "xlnet": "lm_loss.weight",
    "rwkv": "head.weight",
    "biogpt": "output_projection.weight",
}
# T5 and its relatives use the field of the configuration for something else (see `find_ties`).
T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct_text_model", "udop")
TIE = "tie_word_embeddings"


@final
@dataclass(frozen=True, slots=True)
class Ties:
    """Names of the weights that share the numbers of one embedding.

    Attributes
    ----------
    embedding : str or None
        The key under which the base stores the embedding; None if nothing is tied.
    head : str or None
        The key of the head, if it shares the numbers.
    copies : tuple of str
        The keys of all weights that share the numbers, the head first.
    biases : mapping of str to str
        Biases that become separate when the weights are untied → the keys of the base that have their numbers.
    untied : mapping
        Fields of ``config.json`` that make the model untied.
    """

    embedding: str | None = None
    head: str | None = None
    copies: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, object] = field(default_factory=dict)

    def with_copies(self, stored: Mapping[str, Held]) -> Mapping[str, Held]:
        """``stored``, with the tensor of the embedding added for each copy that the base does not store."""
        if self.embedding is None:
            return stored
        copies = {key: stored[self.embedding] for key in self.copies if key not in stored}
        return {**stored, **copies, **{key: stored[source] for key, source in self.biases.items()}}


def find_ties(keys: Iterable[str], config: Mapping[str, Any]) -> Ties:
    """Find the tied weights of a model that stores ``keys``.

    Some models are tied unless ``config.json`` says otherwise. So a missing head counts as tied, except in a model
    whose architecture has no head.
    """
    stored = dict.fromkeys(keys)
    architectures, kind = config.get("architectures"), config.get("model_type")
    # Without a class in the configuration a head is assumed, as most models have one.
    headed = not (isinstance(architectures, list) and architectures) or any(
        str(name).endswith(HEADED) for name in architectures
    )
    always = kind in T5  # T5 uses the field to scale the decoder's output, and is always tied
    # The field may be in the configuration of the text model. Only an explicit false unties; where it is missing,
    # transformers ties.
    text = config.get("text_config")
    setting = config.get(TIE, text.get(TIE) if isinstance(text, dict) else None)
    if setting is False and not always:
        return Ties()
    masked = _masked_lm_ties(stored, kind) if headed else None
    if masked:
        return Ties(*masked, _untied_fields(config))
    for end in EMBEDDINGS:
        ours = [key for key in stored if (key == end or key.endswith(f".{end}")) and not f".{key}".endswith(ENCODERS)]
        # Several keys with this end belong to several embeddings, and none of them is the shared one for certain.
        if len(ours) == 1:
            head = _head_key(ours[0], stored, str(kind)) if headed else None
            copies = (*([head] if head else []), *_embedding_copies(ours[0], stored))
            return Ties(ours[0], head, copies, {}, {} if always else _untied_fields(config)) if copies else Ties()
    return Ties()


def _untied_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """The field with the value false, everywhere in the configuration where transformers reads it."""
    # Parts other than the text model are changed only where they tie too.
    parts = {name: part for name, part in config.items() if isinstance(part, dict)}
    nested = {
        name: {**part, TIE: False} for name, part in parts.items() if name == "text_config" or part.get(TIE) is True
    }
    return {**nested, TIE: False}


def _masked_lm_ties(
    stored: Mapping[str, None], kind: object
) -> tuple[str, str, tuple[str, ...], dict[str, str]] | None:
    """Embedding, head, copies and bias of BERT and similar models, if the layer before the head is stored."""
    embeddings = [key for key in stored if f".{key}".endswith(ENCODERS)]
    for sign, head, bias in MASKED:
        lead = [key.removesuffix(sign) for key in stored if key == sign or key.endswith(f".{sign}")]
        # Several such models in one checkpoint leave open which head belongs to which embedding.
        if len(lead) == 1 and len(embeddings) == 1:
            copied = f"{lead[0]}{head}.bias"
            shared = bias and kind not in UNBIASED and copied not in stored and f"{lead[0]}{bias}" in stored
            key = f"{lead[0]}{head}.weight"
            return embeddings[0], key, (key,), {copied: f"{lead[0]}{bias}"} if shared else {}
    return None


def _head_key(embedding: str, stored: Mapping[str, None], kind: str) -> str | None:
    """The key of the head of a generative model; None if several keys could be it."""
    end = HEADS.get(kind, "lm_head.weight")
    heads = [key for key in stored if key == end or key.endswith((f".{end}", "embed_out.weight"))]
    if heads:
        return heads[0] if len(heads) == 1 else None
    inner, marker, _ = embedding.partition("model.embed_tokens.weight")
    # A complete model within a larger one has a head of its own.
    is_submodel = marker and inner and not inner.startswith("model.")
    return f"{inner}{end}" if is_submodel else end


def _embedding_copies(embedding: str, stored: Mapping[str, None]) -> tuple[str, ...]:
    """The keys of the embeddings of encoder and decoder, if both use a shared embedding."""
    # Only models with encoder and decoder call their embedding `shared`.
    lead = embedding.removesuffix("shared.weight")
    if lead == embedding:
        return ()
    sides = [f"{lead}{side}." for side in ("encoder", "decoder")]
    return tuple(f"{side}embed_tokens.weight" for side in sides if any(key.startswith(side) for key in stored))


Plans = Mapping[str, TensorPlan]


# The plans after the decision on which weights stay tied, notes, and fields of ``config.json`` that change.
Tying = tuple[dict[str, TensorPlan], tuple[str, ...], Mapping[str, object]]


@final
@dataclass(frozen=True, slots=True)
class Tied:
    """The weights of a base that share the numbers of its embedding, if there are any.

    Attributes
    ----------
    ties : Ties
        The names of the weights.
    stored : mapping of str to LazyArray
        The tensors that the base stores under these names: the embedding, copies, and the biases of `Ties`.
    """

    ties: Ties
    stored: Mapping[str, LazyArray]
    _equal: dict[str, bool] = field(default_factory=dict, compare=False)  # results of `_is_copy`

    @classmethod
    def of(cls, base: Mapping[str, LazyArray], config: Mapping[str, Any]) -> Self:
        """Find the tied weights by the keys of the base and ``config.json``."""
        ties = find_ties(base, config)
        names = {ties.embedding, *ties.copies, *ties.biases.values()}
        return cls(ties, {key: tensor for key, tensor in base.items() if key in names})

    @property
    def missing(self) -> tuple[str, ...]:
        """The keys of the copies that the base does not store, the head first."""
        return tuple(key for key in self.ties.copies if key not in self.stored)

    @property
    def lacks_head(self) -> bool:
        """Whether there is a head whose weight the base does not store."""
        return self.ties.head in self.missing

    def target_keys(
        self, adapter: Adapter, key: str, touched: Collection[str], changes: Changes | None = None
    ) -> tuple[str, ...]:
        """The keys that an adapter changes when it names ``key``: that one, or also the copies of the embedding.

        PEFT trains the copies together with the embedding in three cases: under ``ensure_weight_tying``, if single
        tokens are trained, and if the vocabulary was resized. Copies that the adapter itself changes (``touched``) are
        left out.
        """
        # An adapter of the head changes the head alone.
        if key != self.ties.embedding:
            return (key,)
        new = changes.replacement if changes else None
        resized = new is not None and new.shape != self.stored[key].shape
        tokens = changes is not None and changes.tokens is not None
        # Outside of PEFT's three cases, only the named weight is adapted.
        if not ((adapter.config or {}).get("ensure_weight_tying") or resized or tokens):
            return (key,)
        return (key, *(copy for copy in self.copies() if copy not in touched))

    def copies(self) -> list[str]:
        """The keys of the actual copies of the embedding, the head first; a stored copy is read once and compared."""
        return [key for key in self.ties.copies if key in self.missing or self._is_copy(key)]

    def decide(self, changed: Plans, *, untie: bool | None = None, dtype: str | None = None) -> Tying:
        """Decide which weights stay tied, and plan every weight that has to be written.

        Parameters
        ----------
        changed : mapping of str to TensorPlan
            Plans that were made for the base with its copies (`Ties.with_copies`).
        untie : bool or None
            Whether the copies become separate weights, or stay equal to the embedding. None does what makes the merged
            model equivalent to the unmerged adapter.
        dtype : str or None
            The dtype in which the model is written.

        Raises
        ------
        MismatchError
            A copy has an update of its own but has to stay tied.
        """
        embedding = self.ties.embedding
        # Nothing tied is touched, so the model stays as it is.
        if embedding is None or not (untie or any(key in changed for key in (embedding, *self.ties.copies))):
            return dict(changed), (), {}
        copies = self.copies()
        diverging = [key for key in copies if not have_same_change(changed.get(key), changed.get(embedding))]
        if untie or (untie is None and diverging):
            return self._untie(changed, copies, diverging, dtype)
        if any(key in changed for key in diverging):
            raise MismatchError(
                f"{diverging[0]} and {embedding} have different updates, and the base has one weight for both",
                fix="leave out --keep-tied, so that each gets a weight of its own",
            )
        # The copies follow the embedding: their own plans say the same and are dropped.
        plans = {key: plan for key, plan in changed.items() if key not in copies}
        plans |= {
            key: replace(changed[embedding], key=key, base=self.stored[key]) for key in copies if key in self.stored
        }
        aside = ", unlike in the unmerged adapter" if diverging else ""
        notes = [f"{key} shares the weight of {embedding} and changes with it{aside}" for key in copies[:1]]
        return plans, tuple(notes), {}

    def _is_copy(self, key: str) -> bool:
        """Whether a weight that the base stores has the numbers of the embedding; otherwise it is not tied."""
        # Remembered, because the comparison reads both weights.
        if key not in self._equal:
            copy, embedding = self.stored[key], self.stored[self.ties.embedding or key]
            self._equal[key] = copy.dtype == embedding.dtype and have_same_values(copy, embedding)
        return self._equal[key]

    def _untie(self, changed: Plans, copies: list[str], diverging: list[str], dtype: str | None) -> Tying:
        """Plan a tensor of its own for every copy that the base does not store."""
        embedding, by_config = self.ties.embedding, bool(self.ties.untied)
        assert embedding is not None
        tensor = self.stored[embedding]
        # Where the configuration cannot untie, only those that differ are written; the others stay shared.
        written = [key for key in copies if key in self.missing and (by_config or key in diverging)]
        new = dict.fromkeys(written, tensor)
        new |= {key: self.stored[source] for key, source in self.ties.biases.items() if by_config}
        plans = {key: plan for key, plan in changed.items() if key not in self.missing}
        for key, source in new.items():
            plan = changed.get(key, TensorPlan(key, None, as_matrix(source.shape)))
            plans[key] = replace(plan, base=None, replacement=plan.replacement or source)
        size = sum(plans[key].source.size * recast_dtype(plans[key], dtype).itemsize for key in new)
        notes = [f"{', '.join(new)}: written as a weight of its own, {size:,} bytes more"] if new else []
        notes += [
            f"{key} keeps its numbers: the adapter changes {embedding} alone" for key in diverging if key not in changed
        ]
        notes.append(
            f"{TIE} is set to false"
            if by_config
            else "config.json stays as it is: transformers from 5 on does not tie weights that differ in the file"
        )
        return plans, tuple(notes), self.ties.untied


def have_same_change(first: TensorPlan | None, second: TensorPlan | None) -> bool:
    """Whether the plans of two tensors that hold the same numbers lead to the same numbers again."""
    # No plan on either side: both keep their numbers.
    if first is None or second is None:
        return first is second
    if first.shape != second.shape or first.tokens is not second.tokens or len(first.segments) != len(second.segments):
        return False
    ours, theirs = first.replacement, second.replacement
    if ours is not theirs and (ours is None or theirs is None or not have_same_values(ours, theirs)):
        return False
    return all(map(_segments_match, first.segments, second.segments))


def _segments_match(first: Segment, second: Segment) -> bool:
    """Whether two segments add the same update: the same factors, or transposed ones if one weight is transposed."""
    if (first.start, first.stop) != (second.start, second.stop) or len(first.terms) != len(second.terms):
        return False
    ours, theirs = first.magnitude, second.magnitude
    if (ours is None) != (theirs is None) or (ours and theirs and ours.lengths is not theirs.lengths):
        return False
    return all(
        _terms_match(*pair, turned=first.transposed != second.transposed)
        for pair in zip(first.terms, second.terms, strict=True)
    )


def _terms_match(term: Weighted, counterpart: Weighted, *, turned: bool) -> bool:
    (strength, first), (weight, second) = term, counterpart
    # The same object: nothing has to be read.
    if strength != weight or first is second:
        return strength == weight and not turned
    if not (isinstance(first, LowRank) and isinstance(second, LowRank) and first.scale == second.scale):
        return False
    B, A = (second.A.T, second.B.T) if turned else (second.B, second.A)
    return np.array_equal(first.B, B) and np.array_equal(first.A, A)


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

    segments: dict[int, Segment] = field(default_factory=dict)  # by their first row
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
        other_changes, homeless, remarks = find_changes(adapter, strength, weights, base)
        touched = {*other_changes, *(piece.key for weight in weights.modules.values() for piece in weight.pieces)}
        for name, weight in weights.modules.items():
            for piece in weight.pieces:
                # An update of the embedding may be meant for its copies too.
                for key in tied.target_keys(adapter, piece.key, touched):
                    target = piece._replace(key=key)
                    _add_update(drafts.setdefault(key, _Draft()), name, weight, target, adapter.modules[name], strength)
        missing += homeless
        notes += remarks
        for home, changes in other_changes.items():
            for key in tied.target_keys(adapter, home, touched, changes):
                _add_changes(drafts.setdefault(key, _Draft()), key, changes)
    # Missing tensors are reported after all adapters were read, so that one message names all of them.
    if missing and not allow_missing:
        raise MismatchError(
            f"{len(missing)} tensors have no place in the base: {', '.join(missing[:3])}",
            fix="give the base that the adapter was trained on, or leave them out with --allow-missing",
        )
    changed = {key: _plan_tensor(key, draft, base, (scales or {}).get(key)) for key, draft in drafts.items()}
    changed, tying_notes, untied = tied.decide(changed, untie=untie, dtype=dtype)
    notes += [
        f"{key} {tensor.shape} is new: the base has no such tensor"
        for key, tensor in changed.items()
        # Copies and biases that untying writes are reported by their own note.
        if tensor.base is None and key not in tied.ties.copies and key not in tied.ties.biases
    ]
    heads, labels = head_fields(changed, [adapter for adapter, _ in adapters], config or {})
    fields = {**_vocabulary_fields(changed, config), **untied, **labels}
    return MergePlan(changed, tuple(matches), tuple(missing), (*notes, *tying_notes, *heads), fields)


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
    """Add the update of one module to the segment of its rows; updates of several adapters there form one sum."""
    if module.layout.kind == "conv" and module.layout.groups > 1:
        raise MismatchError(
            f"{name}: the update reads all input channels, but the weight of a grouped convolution has only some",
            fix=LEAVE_OUT,
        )
    # As soon as one expert is adapted alone, the whole stack is treated as a matrix of all rows.
    draft.experts |= piece.experts
    start, stop = piece.start, piece.start + piece.rows
    if any(
        # The same range of rows may get several updates, but a segment cannot hold ranges that overlap only in part.
        segment.start < stop and start < segment.stop and (segment.start, segment.stop) != (start, stop)
        for segment in draft.segments.values()
    ):
        raise MismatchError(
            f"{name} adapts some rows of {piece.key}, and another adapter adapts a range that overlaps with them",
            fix="merge one of the adapters first, and the other into the result",
        )
    with place(name):
        term = strength, share_of(module, weight, piece)
    # Several pieces of one module are reported separately, so each needs a name of its own.
    name = f"{name} in {piece.key}" if len(weight.pieces) > 1 else name
    rows_segment = draft.segments.get(start, Segment(name, start, stop, (), weight.transposed))
    draft.segments[start] = replace(rows_segment, terms=(*rows_segment.terms, term))


def _add_changes(draft: _Draft, key: str, changes: Changes) -> None:
    """Add the other changes that an adapter makes to a tensor."""
    names, added = ("replacement", "tokens", "magnitude"), (*draft.changes.added, *changes.added)
    # Differences of several adapters add up, but a tensor can be replaced or scaled by one adapter only.
    given = [(name, value) for name in names for one in (draft.changes, changes) if (value := getattr(one, name))]
    for (name, _), (other, _) in pairwise(given):
        if name == other:
            raise MismatchError(
                f"two adapters give a {name} for {key}",
                fix="merge one of the adapters first, and the other into the result",
            )
    draft.changes = Changes(**dict(given), added=added)


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
    segments = dict(draft.segments)
    if changes.added:
        first_segment = segments.get(0, Segment(key, 0, matrix[0], ()))
        if first_segment.transposed:
            raise MismatchError(
                f"{key} is stored as (in, out), but the adapter has both a pair and a full difference for it",
                fix="leave one of them out",
            )
        # A full difference covers all rows, so it joins the segment that begins at row 0.
        segments[0] = replace(first_segment, terms=(*first_segment.terms, *changes.added))
    if changes.magnitude:
        segments = {
            start: _add_magnitude(segment, changes.magnitude, source.shape) for start, segment in segments.items()
        }
    ordered = tuple(segments[start] for start in sorted(segments))
    return TensorPlan(key, base.get(key), matrix, ordered, changes.replacement, changes.tokens, scale)


def _add_magnitude(segment: Segment, lengths: tuple[LazyArray | None, bool], stored: Shape) -> Segment:
    """Add DoRA's magnitude to a segment, on the axis on which the tensor is stored.

    A convolution with a magnitude per input has one number per channel. LyCORIS stores it as (1, in, 1…) and takes the
    norm over outputs and kernel; ComfyUI computes the same.
    """
    tensor, by_output = lengths
    if len(segment.terms) > 1:
        raise MismatchError(
            f"{segment.module} has a DoRA update in one adapter and an update in another, which cannot be added",
            fix="merge the DoRA adapter alone first, and the others into the result",
        )
    # A magnitude per output runs along the rows of a weight stored (out, in), and along the columns of one stored (in,
    # out).
    axis: Axis = "rows" if by_output != segment.transposed else "columns"
    size = segment.stop - segment.start if axis == "rows" else segment.terms[0][1].shape[0 if by_output else 1]
    if tensor is None:
        return replace(segment, magnitude=Magnitude(None, axis))
    # The columns of a convolution are (in, kernel) flattened, so a channel has several of them.
    channels = stored[1] if axis == "columns" and len(stored) > 2 and not segment.transposed else size
    if tensor.size not in (size, channels):
        raise OptionError(
            f"{segment.module}: {tensor.size} magnitudes for {channels} vectors",
            fix="save the adapter again from training",
        )
    return replace(segment, magnitude=Magnitude(tensor.reshape(tensor.size), axis))


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
