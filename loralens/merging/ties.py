"""Ties: which weights share the numbers of the embedding, by the names of a model's tensors and its configuration."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, final

Held = TypeVar("Held")  # tensors, or their shapes

HEADED = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM", "PreTraining")  # ends of names of models
EMBEDDINGS = (  # ends of keys; the first that exactly one key has is taken
    "shared.weight", "embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight",
    "embed_in.weight",
)  # fmt: skip
ENCODERS = (".embeddings.word_embeddings.weight", ".embeddings.tok_embeddings.weight")  # of BERT and its kin
MASKED = (  # a tensor that is always stored, the head that goes with it, its bias and where the numbers of that are
    ("cls.predictions.transform.dense.weight", "cls.predictions.decoder", "cls.predictions.bias"),
    ("predictions.dense.weight", "predictions.decoder", "predictions.bias"),  # ALBERT
    ("lm_head.dense.weight", "lm_head.decoder", "lm_head.bias"),  # RoBERTa
    ("generator_predictions.dense.weight", "generator_lm_head", ""),  # ELECTRA
    ("vocab_transform.weight", "vocab_projector", ""),  # DistilBERT
    ("head.dense.weight", "decoder", ""),  # ModernBERT
)
UNBIASED = ("esm", "gte")  # kinds whose decoder has no bias, although they are named like RoBERTa
HEADS = {
    "whisper": "proj_out.weight",
    "xlnet": "lm_loss.weight",
    "rwkv": "head.weight",
    "biogpt": "output_projection.weight",
}
T5 = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct_text_model", "udop")
TIE = "tie_word_embeddings"


@final
@dataclass(frozen=True, slots=True)
class Ties:
    """Names of weights that share the numbers of one embedding.

    Attributes
    ----------
    embedding : str or None
        The key under which the base stores them; None where nothing is tied.
    head : str or None
        The key of the head that shares them.
    copies : tuple of str
        The keys of all that share them, the head first.
    biases : mapping of str to str
        Keys of biases that are untied along with them → keys of the base that have their numbers.
    untied : mapping
        Fields of ``config.json`` of a model that is not tied.
    """

    embedding: str | None = None
    head: str | None = None
    copies: tuple[str, ...] = ()
    biases: Mapping[str, str] = field(default_factory=dict)
    untied: Mapping[str, object] = field(default_factory=dict)

    def shown(self, stored: Mapping[str, Held]) -> Mapping[str, Held]:
        """What the base stores, and the same as of the embedding for the copies that it does not store."""
        if self.embedding is None:
            return stored
        copies = {key: stored[self.embedding] for key in self.copies if key not in stored}
        return {**stored, **copies, **{key: stored[source] for key, source in self.biases.items()}}


def find_ties(keys: Iterable[str], config: Mapping[str, Any]) -> Ties:
    """What is tied in a model that stores ``keys``.

    Some models are tied unless ``config.json`` says otherwise, so a missing head counts as tied too, but in a model
    that by its architecture has none.
    """
    stored = dict.fromkeys(keys)
    made, kind = config.get("architectures"), config.get("model_type")
    headed = not (isinstance(made, list) and made) or any(str(name).endswith(HEADED) for name in made)
    always = kind in T5  # T5 reads the field as a scaling of the decoder, and ties whatever it says
    if _says(config) is False and not always:
        return Ties()
    masked = _masked(stored, kind) if headed else None
    if masked:
        return Ties(*masked, _untied_fields(config))
    for end in EMBEDDINGS:
        ours = [key for key in stored if (key == end or key.endswith(f".{end}")) and not f".{key}".endswith(ENCODERS)]
        if len(ours) == 1:
            head = _head(ours[0], stored, str(kind)) if headed else None
            copies = (*([head] if head else []), *_readers(ours[0], stored))
            return Ties(ours[0], head, copies, {}, {} if always else _untied_fields(config)) if copies else Ties()
    return Ties()


def _says(config: Mapping[str, Any]) -> object:
    """What the configuration says, that of the text model where it is one of several."""
    text = config.get("text_config")
    return config.get(TIE, text.get(TIE) if isinstance(text, dict) else None)


def _untied_fields(config: Mapping[str, Any]) -> dict[str, object]:
    """The field wherever a configuration has it: transformers reads that of the text model too."""
    parts = {name: part for name, part in config.items() if isinstance(part, dict)}
    nested = {
        name: {**part, TIE: False} for name, part in parts.items() if name == "text_config" or part.get(TIE) is True
    }
    return {**nested, TIE: False}


def _masked(stored: Mapping[str, None], kind: object) -> tuple[str, str, tuple[str, ...], dict[str, str]] | None:
    """Embedding, head and bias of BERT and its kin, where the layer before the head shows that there is one."""
    embeddings = [key for key in stored if f".{key}".endswith(ENCODERS)]
    for sign, head, bias in MASKED:
        lead = [key.removesuffix(sign) for key in stored if key == sign or key.endswith(f".{sign}")]
        if len(lead) == 1 and len(embeddings) == 1:
            copied = f"{lead[0]}{head}.bias"
            shared = bias and kind not in UNBIASED and copied not in stored and f"{lead[0]}{bias}" in stored
            key = f"{lead[0]}{head}.weight"
            return embeddings[0], key, (key,), {copied: f"{lead[0]}{bias}"} if shared else {}
    return None


def _head(embedding: str, stored: Mapping[str, None], kind: str) -> str | None:
    """The key of the head of a model that writes text; None of one that has another."""
    end = HEADS.get(kind, "lm_head.weight")
    here = [key for key in stored if key == end or key.endswith((f".{end}", "embed_out.weight"))]
    if here:
        return here[0] if len(here) == 1 else None
    inner, found, _ = embedding.partition("model.embed_tokens.weight")
    beside = found and inner and not inner.startswith("model.")  # a whole model in a larger one has its own head
    return f"{inner}{end}" if beside else end


def _readers(embedding: str, stored: Mapping[str, None]) -> tuple[str, ...]:
    """The embeddings of an encoder and a decoder that read what both share."""
    lead = embedding.removesuffix("shared.weight")
    if lead == embedding:
        return ()
    sides = [f"{lead}{side}." for side in ("encoder", "decoder")]
    return tuple(f"{side}embed_tokens.weight" for side in sides if any(key.startswith(side) for key in stored))
