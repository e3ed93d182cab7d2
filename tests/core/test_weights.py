"""Which weight of a base a module adapts, and in which orientation."""

import numpy as np
import pytest

from loralens import MismatchError
from loralens.core import weights_of
from tests.core.test_storage import module, tensor


def test_linear_weights_stand_as_they_are_and_conv1d_lies():
    base = {"a.weight": tensor(3, 5), "b.weight": tensor(3, 5)}
    found = weights_of({"a": module(3, 5), "b": module(5, 3)}, base).modules
    assert not found["a"].transposed
    assert found["b"].transposed
    np.testing.assert_array_equal(found["b"].read(), base["b.weight"].read().T)
    assert found["b"].shape == (5, 3)


@pytest.mark.parametrize("names", [("square", "wide"), ("wide", "square")])
def test_a_square_weight_follows_its_siblings(names):
    modules = {"square": module(4, 4), "wide": module(12, 4)}
    base = {"square.weight": tensor(4, 4), "wide.weight": tensor(4, 12)}
    found = weights_of({name: modules[name] for name in names}, base).modules
    assert found["square"].transposed


def test_a_square_weight_alone_follows_the_kind_of_the_base_or_the_file():
    base = {"a.weight": tensor(4, 4)}
    assert not weights_of({"a": module(4, 4)}, base).modules["a"].transposed
    assert weights_of({"a": module(4, 4)}, base, conv1d=True).modules["a"].transposed
    assert weights_of({"a": module(4, 4, transposed=True)}, base).modules["a"].transposed


def test_an_embedding_is_dim_by_vocab_even_where_it_is_square():
    for vocab in (7, 4):
        found = weights_of({"e": module(4, vocab, "embedding")}, {"e.weight": tensor(vocab, 4)}).modules["e"]
        assert found.transposed
        assert found.read().shape == (4, vocab)


def test_convolutions_are_flattened_and_experts_picked():
    base = {"c.weight": tensor(4, 3, 2, 2), "x.w": tensor(5, 6, 4)}
    modules = {"c": module(4, 12, "conv", kernel=(2, 2)), "x.w[3]": module(4, 6, "experts")}
    found = weights_of(modules, base).modules
    np.testing.assert_array_equal(found["c"].read(), base["c.weight"].read().reshape(4, 12))
    np.testing.assert_array_equal(found["x.w[3]"].read(), base["x.w"].read()[3].T)


def test_an_expert_that_the_base_has_not_is_an_error():
    with pytest.raises(MismatchError, match="has only 5 experts"):
        weights_of({"x.w[5]": module(4, 6, "experts")}, {"x.w": tensor(5, 4, 6)})
