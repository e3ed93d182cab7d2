"""Packed rows and batches of similar lengths: the same loss, and less padding."""

import copy
from typing import Any

import numpy as np
import pytest

from loralens.training.feed import shuffle_order
from loralens.training.injection import inject
from loralens.training.texts.packing import filled_share, pack_texts
from loralens.training.texts.tasks import Examples, task_named
from tests import models
from tests.training.conftest import randomise
from tests.training.test_ranks import mixture

LENGTHS = (3, 9, 1, 6, 2, 8, 5, 4, 12, 7)
TASK = task_named("causal-lm")


def texts(learned: bool = False) -> Examples:
    rng = np.random.default_rng(0)
    tokens = [rng.integers(3, 24, length).tolist() for length in LENGTHS]
    masks = [[bool(place % 3) for place in range(length)] for length in LENGTHS] if learned else None
    return Examples(tokens, 0, learned=masks)


def test_rows_hold_every_text_once_and_are_full() -> None:
    some = texts()
    rows = pack_texts(some, 16)
    assert sorted(text for row in rows.members or () for text in row) == list(range(len(LENGTHS)))
    assert len(rows) == 4  # 57 tokens take at least as many rows of 16
    assert filled_share(rows, 16) == 57 / 64
    for row, members in enumerate(rows.members or ()):
        assert rows.tokens[row] == [token for text in members for token in some.tokens[text]]


@pytest.mark.some(3)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_the_loss_and_the_gradients_are_those_of_the_texts_alone(kind: str, learned: bool) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1
    )
    makers: dict[str, Any] = {
        "llama": models.llama,
        "gpt2": lambda: transformers.GPT2LMHeadModel(config).eval(),
        "mixtral": lambda: mixture("mixtral"),
    }
    model, some = makers[kind](), texts(learned)
    rows = pack_texts(some, 16)
    found: list[tuple[float, int, Any]] = []
    for examples in (some, rows):
        made = inject(copy.deepcopy(model), targets="*attn*", rank=2)
        randomise(made)
        total, count = TASK.loss(made.model, examples.batch(range(len(examples))))
        total.backward()
        found.append((float(total.detach()), count, [layer.B.grad for layer in made.layers.values()]))
    (alone, count, wanted), (packed, same, gradients) = found
    assert count == same
    assert packed == pytest.approx(alone, rel=1e-5)
    for mine, theirs in zip(gradients, wanted, strict=True):
        # Rounding of float32, which the products of experts do not go beyond.
        assert float((mine - theirs).norm()) < 1e-3 * float(theirs.norm())


def test_batches_of_similar_lengths_have_less_padding_and_every_text_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1000).tolist()
    plain = shuffle_order(1000, size=8, seed=1)
    grouped = shuffle_order(1000, size=8, seed=1, lengths=lengths)

    def padded(order: Any) -> int:
        return sum(8 * max(lengths[i] for i in order(number)) for number in range(125))

    assert sorted(i for number in range(125) for i in grouped(number)) == list(range(1000))
    assert padded(grouped) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < padded(plain)
    assert grouped(0) == shuffle_order(1000, size=8, seed=1, lengths=lengths)(0)
    rounds = [[grouped(number) for number in range(start, start + 125)] for start in (0, 125)]
    assert rounds[0] != rounds[1]
    # Long and short batches are mixed.
    longest = [max(lengths[i] for i in batch) for batch in rounds[0]]
    assert abs(np.corrcoef(longest, range(125))[0, 1]) < 0.4
