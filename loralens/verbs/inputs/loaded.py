"""A model that is ready to run, with its tokenizer, and batches of texts as its inputs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from loralens.errors import MismatchError, OptionError
from loralens.verbs.inputs.texts import InputText

if TYPE_CHECKING:  # torch is imported where a model is loaded
    from torch import nn

    from loralens.training.tasks import Examples

Head = Literal["causal", "masked", "classifier", ""]


class Loaded(NamedTuple):
    """A model ready to run: what its logits are ("": it has none), and what turns texts into its inputs.

    ``missing`` names the weights that its folder did not have, which are random.
    """

    model: "nn.Module"
    tokenizer: Any
    head: Head
    missing: tuple[str, ...] = ()

    def batches(
        self, texts: Sequence[InputText], *, batch: int, length: int, step: Callable[[int], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Inputs, ``batch`` texts at a time, cut to ``length`` tokens and padded on the right; no labels.

        ``step`` is told how many texts the model has seen.
        """
        length = self.length(length)
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            inputs = dict(
                self.tokenizer(
                    [one.text for one in part],
                    padding=len(part) > 1,
                    truncation=True,
                    max_length=length,
                    return_tensors="pt",
                    return_attention_mask=True,
                )
            )
            for number, tokens in enumerate(inputs["input_ids"].tolist(), start=start + 1):
                self._check(number, tokens)
            yield inputs
            if step:
                step(len(part))

    def encoded(self, texts: Sequence[str], *, length: int, labels: Sequence[int] | None = None) -> "Examples":
        """Texts as tokens that the model knows, cut to ``length`` of them, or to what it has positions for.

        Raises
        ------
        OptionError
            There is no room for a text beside what the tokenizer adds; a text has no tokens.
        MismatchError
            A token that the model has no embedding for.
        """
        from loralens.training.tasks import encode_texts

        examples = encode_texts(self.tokenizer, texts, length=self.length(length), labels=labels)
        for number, tokens in enumerate(examples.tokens, start=1):
            self._check(number, tokens)
        words = self.words or examples.vocabulary
        if examples.pad >= words:
            raise MismatchError(
                f"the tokenizer pads with token {examples.pad}, and the model has {words}",
                fix="set pad_token in tokenizer_config.json to one that the model has",
            )
        mask = examples.mask if examples.mask is None or examples.mask < words else None
        return replace(examples, vocabulary=min(examples.vocabulary, words), mask=mask)

    def length(self, tokens: int) -> int:
        """The number of tokens that texts are cut to, where so many are asked for."""
        length = min(tokens, self.longest)
        added = self.tokenizer.num_special_tokens_to_add(pair=False)
        if length <= added:
            raise OptionError(
                f"--length {length} leaves no room for a text: the tokenizer adds {added} tokens of its own",
                fix=f"give {added + 1} or more",
            )
        return length

    @property
    def longest(self) -> int:
        """Most tokens that the model has positions for.

        Where the embedding of positions has a padding index, as RoBERTa's has, positions begin behind it.
        """
        config = self.model.config
        counts = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        for name, layer in self.model.named_modules():
            first = getattr(layer, "padding_idx", None)
            if "position" in name.rpartition(".")[2] and isinstance(first, int) and hasattr(layer, "num_embeddings"):
                counts.append(layer.num_embeddings - first - 1)
        return int(min([n for n in counts if isinstance(n, int) and n > 0] + [self.tokenizer.model_max_length]))

    @property
    def words(self) -> int | None:
        """How many tokens the model has embeddings for; None where it does not say."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            return None

    def random(self, brought: Collection[str]) -> set[str]:
        """The missing weights that nobody brought; none where all of these are 0, whatever the seed."""
        parameters = self.model.state_dict(keep_vars=True)
        keys = set(self.missing).difference(brought)
        return keys if any(key not in parameters or parameters[key].any() for key in keys) else set()

    def _check(self, number: int, tokens: Sequence[int]) -> None:
        """Refuse a token that the model has no embedding for."""
        words = self.words
        if words is not None and max(tokens, default=0) >= words:
            token = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise MismatchError(
                f"text {number} holds {token!r}, token {max(tokens)} of the tokenizer, and the model has {words}",
                fix="give the model the tokenizer that it was trained with",
            )
