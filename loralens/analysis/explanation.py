"""What did an adapter learn? Which tokens it makes more likely in any text, and which tokens its weights write.

A *word* is what tokens have in common that differ in case and spaces only, and its p is the sum of theirs: an adapter
that learned to write everything in small letters has learned no word by it. A *change* is log(p + 1e-6) with the
adapter minus that of the base, in nats: the small number keeps words that neither model ever expects from leading the
list. Every measure is compared with that of random updates, which keep the singular values of every module and draw its
directions uniformly.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.errors import visible
from loralens.tables.table import Recorded

if TYPE_CHECKING:
    from loralens.core.structured import Update

Vector = NDArray[np.float32]  # one number for every token of the vocabulary, or for every word

FLOOR = 1e-6  # what is added to both probabilities before their logarithms are compared
# A trained adapter changes general text 30 to 600 times as much as random updates of its spectra do.
CLOSE = 3.0
# Words are ordered by change × log₁₀(COMMON/p), p that of the base: a change of a rare word says more of a topic than
# the same change of "the". It also puts the right one of 31 topics first where the change alone does not.
COMMON = 10**-1.5
# Of 50 random updates of five kinds, 12 write more along some token than both others of their spectra do, and none
# exceeds them by a tenth of the distance from the median to the largest.
MARGIN = 0.25
LEAST_T = 3.0  # a word has changed in the same direction in nearly all texts
KEPT = 50  # words that are kept of every list; the terminal shows the first ones
# The last part of the name of a weight whose outputs are added to the residual stream, in the families of models.
WRITERS = frozenset(
    ["o_proj", "out_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "fc_out", "wo", "w2"]
)
SPACES = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
SKETCH = 512  # columns of the sketch of the base's own weights: its error is √(2/512), 6 %


@final
@dataclass(frozen=True, slots=True)
class Size(Recorded):
    """The size of a change, beside that of random updates with the same spectra.

    Attributes
    ----------
    kl : float
        Mean KL(with the adapter ‖ base) of the distributions of the next token, in nats.
    random : float
        The largest of the random updates, in nats.
    """

    kl: float
    random: float

    @property
    def weak(self) -> bool:
        """Whether the adapter changes hardly more than random updates do."""
        return not self.kl > CLOSE * self.random


@final
@dataclass(frozen=True, slots=True)
class Word(Recorded):
    """A word or a symbol of one list.

    Attributes
    ----------
    text : str
        The token without spaces around it, in the case of its strongest variant.
    change : float
        By what the list is ordered: the mean change in nats; for what weights write, the logarithm of a ratio.
    texts : int or None
        In how many texts the change has the direction of the list; None where no text was read.
    symbol : bool
        Whether it has no letters, or only one.
    """

    text: str
    change: float
    texts: int | None
    symbol: bool


@final
@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model, and the words that they are variants of.

    Attributes
    ----------
    texts : sequence of str
        Of every token. Tokens that stand for nothing readable, such as special ones, are empty.
    keys : sequence of str
        Of every word, see `merged_key`. The first one is empty: it stands for all that cannot be read.
    word : int array, shape (tokens,)
        The word of every token.
    """

    texts: Sequence[str]
    keys: Sequence[str] = field(init=False)
    word: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        numbers = {"": 0}
        word = [numbers.setdefault(merged_key(text), len(numbers)) for text in self.texts]
        object.__setattr__(self, "keys", list(numbers))
        object.__setattr__(self, "word", np.array(word, np.int64))

    def best(self, scores: Vector) -> tuple[Vector, NDArray[np.int64]]:
        """The largest score of the variants of every word, and which token has it.

        Parameters
        ----------
        scores : float32 array, shape (tokens,)
        """
        order = np.argsort(scores[: len(self.word)], kind="stable")
        token = np.zeros(len(self.keys), np.int64)
        token[self.word[order]] = order  # the last one stays
        return scores[token], token

    def rank(
        self,
        scores: Vector,
        shown: NDArray[np.int64],
        *,
        above: float = 0.0,
        rose: NDArray[np.int64] | None = None,
        changes: Vector | None = None,
        chosen: NDArray[np.bool_] | None = None,
    ) -> list[Word]:
        """The words and symbols with the largest scores.

        Parameters
        ----------
        scores : float32 array, shape (words,)
        shown : int array, shape (words,)
            The token that is printed for each word.
        above : float
            Only words with a larger score.
        rose : int array, shape (words,), optional
            In how many texts each word has changed in this direction.
        changes : float32 array, shape (words,), optional
            What is told of each word, where it is not the score.
        chosen : bool array, shape (words,), optional
            Which words may be listed.
        """
        allowed = scores > above
        allowed[0] = False
        if chosen is not None:
            allowed &= chosen
        found: list[Word] = []
        counts = {True: 0, False: 0}
        places = np.flatnonzero(allowed)
        for place in places[np.argsort(-scores[places], kind="stable")]:
            symbol = is_symbol(self.keys[place])
            if counts[symbol] == KEPT:
                continue
            counts[symbol] += 1
            texts = None if rose is None else int(rose[place])
            change = float((scores if changes is None else changes)[place])
            found.append(Word(_shown(self.texts[shown[place]]), change, texts, symbol))
            if min(counts.values()) == KEPT:
                break
        return found


def merged_key(text: str) -> str:
    """What variants of a word in case and in the spaces around it have in common; empty for what cannot be read."""
    if not text or "\ufffd" in text:
        return ""
    return text.strip().casefold() or text


def is_symbol(key: str) -> bool:
    """Whether a token is no word: it has no letters, or one letter of an alphabet."""
    letters = sum(letter.isalpha() for letter in key)
    # One sign of Chinese or Japanese is a word; Unicode has no case for it.
    return letters == 0 or (letters == 1 and key.upper() != key.lower()) or 2 * letters < len(key)


def _shown(text: str) -> str:
    """A token as it is printed: without spaces around it, or with signs for them where there is nothing else."""
    bare = text.strip()
    if any(letter.isprintable() for letter in bare):  # no mark without a width is
        return visible(bare)
    return "".join(SPACES.get(letter) or f"U+{ord(letter):04X}" for letter in text)


@final
@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of all words in several texts.

    Attributes
    ----------
    by_text : float32 array, shape (texts, words)
        The mean over the positions of each text, in nats.
    shown : int array, shape (words,)
        The variant of each word that is most probable with the adapter, as the number of a token.
    weight : float32 array, shape (words,), or 1
        What changes are multiplied by where words are ordered and compared with random updates: log₁₀(`COMMON`/p) with
        the mean p of the base, and 0 for more common words.
    """

    by_text: NDArray[np.float32]
    shown: NDArray[np.int64]
    weight: Vector | float = 1.0

    def minus(self, siblings: "Sequence[Changes]") -> "Changes":
        """What is left if the mean change of sibling adapters is subtracted."""
        if not siblings:
            return self
        shared = sum(sibling.by_text for sibling in siblings) / np.float32(len(siblings))
        return replace(self, by_text=self.by_text - shared)

    @property
    def mean(self) -> Vector:
        """The mean over texts, in nats."""
        return np.asarray(self.by_text.mean(0), np.float32)

    @property
    def score(self) -> Vector:
        """The weighted mean, by which words are ordered; what cannot be read has none."""
        score = np.asarray(self.mean * self.weight, np.float32)
        score[0] = 0
        return score

    @property
    def t(self) -> Vector:
        """Student's t of the mean over texts."""
        spread = self.by_text.std(0, ddof=1) if len(self.by_text) > 1 else np.zeros_like(self.by_text[0])
        return np.asarray(self.mean / np.maximum(spread / np.sqrt(len(self.by_text)), 1e-6), np.float32)

    def words(
        self, vocabulary: Vocabulary, random: "Sequence[Changes]", *, sign: int = 1, least_t: float = LEAST_T
    ) -> list[Word]:
        """The words that become more likely (``sign`` 1) or less likely (−1) in any text.

        Only those that change in nearly all texts, and more than any word does under any random update.
        """
        largest = max((float((sign * one.score).max()) for one in random), default=0.0)
        rose, chosen = (sign * self.by_text > 0).sum(0), sign * self.t > least_t
        return vocabulary.rank(
            sign * self.score, self.shown, above=max(largest, 0.0), rose=rose, changes=self.mean, chosen=chosen
        )


def rarity(p: Vector) -> Vector:
    """log₁₀(`COMMON`/p) of words with these mean probabilities, at least 0."""
    return np.asarray(np.log10(COMMON / np.clip(p, FLOOR, COMMON)), np.float32)


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """An adapter with the singular values of every module and uniform random directions; nothing else of the file."""
    rng = np.random.default_rng(seed)
    modules: dict[str, Update] = {}
    for name, module in adapter.items():
        s = module.singular_values()
        sides = [np.linalg.qr(rng.standard_normal((size, len(s))))[0] for size in module.shape]
        B, A = ((side * np.sqrt(s)).astype(np.float32) for side in sides)
        modules[name] = LowRank(B, A.T, layout=module.layout)
    return Adapter(modules=modules, base_model=adapter.base_model)


def directions(unembedding: NDArray[np.float32], norm: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """The unit vectors ê of the residual stream that make tokens more likely, shape (tokens, width).

    These are the rows of the unembedding times the weight of the last norm, without their mean, which changes no
    probability.
    """
    rows = unembedding if norm is None else unembedding * norm
    rows = rows - rows.mean(0)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(lengths > 0, lengths, 1), np.float32)


def write_scores(unit: NDArray[np.float32], updates: Iterable["Update"]) -> Vector | None:
    """Mean over modules of width · ‖ΔWᵀê‖² / ‖ΔW‖² for every token: 1 is what random directions have.

    None if no module changes anything.
    """
    columns = []
    for update in updates:
        U, s, _ = update.svd()
        if s.size and s[0] > 0:
            columns.append((U * (s / np.linalg.norm(s))).astype(np.float32))
    return squares_along(unit, np.concatenate(columns, axis=1), len(columns)) if columns else None


def squares_along(unit: NDArray[np.float32], columns: NDArray[np.float32], modules: int) -> Vector:
    """Width · ‖columnsᵀê‖² / modules for every token."""
    width = unit.shape[1]
    if columns.shape[1] > width:  # the Gram matrix is then smaller than the columns
        sums = ((unit @ (columns @ columns.T)) * unit).sum(1)
    else:
        sums = ((unit @ columns) ** 2).sum(1)
    return np.asarray(sums * (width / modules), np.float32)


def base_scores(unit: NDArray[np.float32], weights: Iterable[NDArray[np.float32]]) -> Vector | None:
    """The same measure of the base's own weights W (out, in), from a random sketch of all of them together."""
    rng = np.random.default_rng(0)
    total, modules = np.zeros((unit.shape[1], min(SKETCH, unit.shape[1])), np.float32), 0
    for W in weights:
        signs = rng.choice(np.array([-1, 1], np.float32), (W.shape[1], total.shape[1]))
        total += (W @ signs) / np.linalg.norm(W) if W.any() else 0
        modules += 1
    return squares_along(unit, total / np.sqrt(np.float32(total.shape[1])), modules) if modules else None


def relative(scores: Vector, own: Vector | None) -> Vector:
    """The logarithm of what an adapter writes, relative to what the base writes along the same token."""
    tiny = np.float32(1e-12)
    return np.asarray(np.log(scores + tiny) - (0 if own is None else np.log(own + tiny)), np.float32)


def written_words(
    vocabulary: Vocabulary, scores: Vector, random: Sequence[Vector], siblings: Sequence[Vector] = ()
) -> list[Word]:
    """The words along which an adapter writes clearly more than random updates do along any token.

    With siblings, what is left of these if their mean is subtracted.
    """
    largest = max((float(one.max()) for one in random), default=0.0)
    middle = float(np.median(np.concatenate(random))) if random else 0.0
    beyond = scores > largest + MARGIN * (largest - middle)
    left = np.asarray(scores - sum(siblings) / len(siblings), np.float32) if siblings else scores
    best, shown = vocabulary.best(np.where(beyond, left, np.float32(-np.inf)))
    return vocabulary.rank(best, shown, above=0.0 if siblings else -np.inf)
