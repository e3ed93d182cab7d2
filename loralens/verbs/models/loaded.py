"""A model that is ready to run, with its tokenizer, and texts as its inputs."""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from loralens.errors import MismatchError, OptionError
from loralens.verbs.models.texts import InputText

if TYPE_CHECKING:  # torch is imported where a model is loaded
    from torch import nn

    from loralens.training.tasks import Examples
    from loralens.verbs.models.encoding import Dialogue

Head = Literal["causal", "masked", "classifier", ""]


class Loaded(NamedTuple):
    """A model that is ready to run, with its tokenizer.

    Attributes
    ----------
    head : str
        The kind of its logits; empty if it has none.
    missing : tuple of str
        The names of the weights that its folder did not have. They are random.
    """

    model: "nn.Module"
    tokenizer: Any
    head: Head
    missing: tuple[str, ...] = ()

    def batches(
        self, texts: Sequence[InputText], *, batch: int, length: int, step: Callable[[int], None] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Inputs without labels: ``batch`` texts at a time, cut to ``length`` tokens and padded on the right.

        ``step`` is called with the number of texts of each batch after the model has seen it.
        """
        length = self.length(length)
        for start in range(0, len(texts), batch):
            part = texts[start : start + batch]
            inputs = dict(
                self.tokenizer(
                    [text.text for text in part],
                    padding=len(part) > 1,  # a single text needs none, and some tokenizers have no token for it
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

    def encode(
        self,
        texts: "Sequence[str | Dialogue]",
        *,
        length: int,
        labels: Sequence[int] | None = None,
        mask_prompt: bool = True,
    ) -> "Examples":
        """Texts as tokens, cut to ``length`` of them, or to as many as the model has positions for.

        Raises
        ------
        OptionError
            The tokens that the tokenizer adds leave no room for a text, or a text has no tokens.
        MismatchError
            The model has no embedding for a token.
        """
        from loralens.verbs.models.encoding import encode_texts

        examples = encode_texts(
            self.tokenizer, texts, length=self.length(length), labels=labels, mask_prompt=mask_prompt
        )
        for number, tokens in enumerate(examples.tokens, start=1):
            self._check(number, tokens)
        words = self.words
        # torch would fail with an index out of range, deep in the model, and say neither the token nor the remedy.
        if words is not None and examples.pad >= words:
            raise MismatchError(
                f"the tokenizer pads with token {examples.pad}, and the model has {words}",
                fix="set pad_token in tokenizer_config.json to one that the model has",
            )
        return examples

    def length(self, tokens: int) -> int:
        """The number of tokens to which texts are cut if so many are asked for.

        Raises
        ------
        OptionError
            The tokens that the tokenizer adds leave no room for a text.
        """
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
        """The largest number of tokens for which the model has positions.

        If the embedding of positions has a padding index, as RoBERTa's has, positions begin after it.
        """
        # The names of the setting in most configurations of transformers, and in GPT-2's.
        config = self.model.config
        counts = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")]
        for name, layer in self.model.named_modules():
            first = getattr(layer, "padding_idx", None)
            if "position" in name.rpartition(".")[2] and isinstance(first, int) and hasattr(layer, "num_embeddings"):
                counts.append(layer.num_embeddings - first - 1)
        # A tokenizer without a limit states a huge number, which never is the smallest.
        return int(min([n for n in counts if isinstance(n, int) and n > 0] + [self.tokenizer.model_max_length]))

    @property
    def words(self) -> int | None:
        """The number of tokens for which the model has embeddings; None if it does not say."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
        except (AttributeError, NotImplementedError):  # a model whose inputs are not tokens
            return None

    def random(self, brought: Collection[str]) -> set[str]:
        """The missing weights that ``brought`` does not contain; none if all of these are 0.

        Zeros do not depend on a seed: new biases are 0, for example.
        """
        parameters = self.model.state_dict(keep_vars=True)
        keys = set(self.missing).difference(brought)
        return keys if any(key not in parameters or parameters[key].any() for key in keys) else set()

    def _check(self, number: int, tokens: Sequence[int]) -> None:
        """Refuse a token for which the model has no embedding; ``number`` is that of the text, for the message."""
        words = self.words
        if words is not None and max(tokens, default=0) >= words:
            token = self.tokenizer.convert_ids_to_tokens(max(tokens))
            raise MismatchError(
                f"text {number} holds {token!r}, token {max(tokens)} of the tokenizer, and the model has {words}",
                fix="give the model the tokenizer that it was trained with",
            )
