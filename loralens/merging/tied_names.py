"""Which weights of a model share the numbers of its embedding, from the names of its tensors and its configuration."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

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
