"""What a merge will do to which tensor, and what it refuses: nothing an adapter carries is left without a word."""

from dataclasses import replace

import numpy as np
import pytest

import loralens
from loralens.core.adapter import Adapter, Extra, Finding
from loralens.core.lazy import LazyArray
from loralens.errors import FormatError, LoraLensError, MismatchError
from loralens.merging.planning import CHANGED_BASE, plan_merge
from tests.merging.made import Case, Maker, adapter, conv1d, experts, linear, several, streamed

TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"]}


def planned(case, **options):
    return plan_merge(case.adapters, case.lazy, **case.options, **options)


def make():
    return Maker(1, np.float32)


def head_and_embedding():
    """A maker, and a tied base: no head of its own."""
    made = make()
    base = {"model.embed_tokens.weight": made.weight(9, 4), "model.a.weight": made.weight(4, 4)}
    return made, base


def test_slabs_lie_where_the_experts_do_and_sums_are_one_slab():
    tensor = planned(experts(make())).tensors["x.w"]
    assert tensor.matrix == (12, 7)
    assert [(slab.start, slab.stop) for slab in tensor.slabs] == [(0, 4), (8, 12)]
    assert planned(conv1d(make())).tensors["a.weight"].slabs[0].transposed
    (slab,) = planned(several(make())).tensors["a.weight"].slabs
    assert [strength for strength, _ in slab.terms] == [0.7, -1.3, 2.0]


def test_names_are_matched_and_extras_renamed_with_them():
    made = make()
    base = {"encoder.a.weight": streamed(made.weight(6, 10)), "encoder.a.bias": streamed(made.weight(6))}
    one = adapter(
        {"bert.encoder.a": made.pair(6, 10)},
        b=("bias", "bert.encoder.a", made.floats(6), "bias"),
        h=("saved", "classifier", made.floats(2, 6), "weight"),
    )
    found = plan_merge([(one, 1.0)], base)
    assert set(found.tensors) == {"encoder.a.weight", "encoder.a.bias", "classifier.weight"}
    assert found.notes == ("classifier.weight (2, 6) is new: the base has no such tensor",)
    assert str(found.matches[0]) == "1/1 modules match after dropping 'bert.'"


def test_what_has_no_place_is_an_error_or_left_out():
    made = make()
    base = {"a.weight": streamed(made.weight(6, 10))}
    two = adapter({"a": made.pair(6, 10), "b": made.pair(6, 10)}, c=("bias", "c", made.floats(6), "bias"))
    with pytest.raises(MismatchError, match="b"):
        plan_merge([(two, 1.0)], base)
    found = plan_merge([(two, 1.0)], base, allow_missing=True)
    assert set(found.tensors) == {"a.weight"}
    assert found.missing == ("b", "c")
    orphan = adapter({"a": made.pair(6, 10)}, c=("diff_b", "c", made.floats(6), "bias"))
    with pytest.raises(MismatchError, match="no place in the base"):
        plan_merge([(orphan, 1.0)], base)


@pytest.mark.parametrize("code", CHANGED_BASE)
def test_updates_of_another_base_are_refused(code):
    case = linear(make())
    ((one, _),) = case.adapters
    with pytest.raises(FormatError, match="cannot be merged"):
        plan_merge([(Adapter(modules=one.modules, findings=(Finding("warning", code, "so"),)), 1.0)], case.lazy)


@pytest.mark.parametrize("role", ["shape", "diagonal", "other"])
def test_what_is_not_understood_is_refused(role):
    case = linear(make())
    ((one, _),) = case.adapters
    extra = {"x": Extra(role, "a", LazyArray.of(np.zeros(3, np.float32)))}
    with pytest.raises(FormatError, match=r"x: .* cannot be merged"):
        plan_merge([(Adapter(modules=one.modules, extra=extra), 1.0)], case.lazy)


def refused():
    """Cases that contradict themselves, and what is said."""
    made = make()
    W, one = made.weight(6, 10), made.pair(6, 10)
    lengths = made.floats(6)
    dora = adapter({"a": one}, m=("magnitude", "a", lengths, "weight"))
    head = adapter({"a": one}, h=("saved", "h", made.floats(2, 6), "weight"))
    base = {"a.weight": W, "h.weight": made.weight(2, 6), "c.weight": made.weight(4, 3, 2, 2), "a.bias": made.weight(6)}
    yield "two magnitudes", [(dora, 1.0), (dora, 1.0)], base, "two adapters give a magnitude"
    yield "two heads", [(head, 1.0), (head, 1.0)], base, "two adapters give a replacement"
    yield "DoRA and more", [(dora, 1.0), (adapter({"a": made.pair(6, 10)}), 1.0)], base, "which cannot be added"
    yield "lengths", [(adapter({"a": one}, m=("magnitude", "a", made.floats(5), "weight")), 1.0)], base, "5 magnitudes"
    four = adapter(
        {"c": made.pair(4, 12, kind="conv", kernel=(2, 2))}, m=("magnitude_in", "c", made.floats(4), "weight")
    )
    yield "channels", [(four, 1.0)], base, "4 magnitudes for 3 vectors"
    grouped = loralens.LowRank(
        made.floats(4, 2), made.floats(2, 12), 1.0, layout=made.pair(4, 12, kind="conv", groups=2).layout
    )
    yield "groups", [(adapter({"c": grouped}), 1.0)], base, "grouped convolution"
    bad_head = adapter({"a": one}, h=("saved", "h", made.floats(3, 6), "weight"))
    yield "head", [(bad_head, 1.0)], base, "cannot replace"
    yield "difference", [(adapter({"a": one}, d=("diff_b", "a", made.floats(5), "bias")), 1.0)], base, "cannot be added"
    turned = adapter({"c": made.pair(4, 12, kind="conv", kernel=(2, 2))}, d=("diff", "a", made.floats(10, 6), "weight"))
    yield "turned difference", [(turned, 1.0)], base, r"d \(10, 6\) cannot be added to a\.weight \(6, 10\)"
    column = adapter({"a": one}, d=("diff_b", "a", made.floats(6, 1), "bias"))
    yield "bias as a column", [(column, 1.0)], base, r"d \(6, 1\) cannot be added to a\.bias \(6,\)"
    stray = adapter({"c": made.pair(4, 12, kind="conv", kernel=(2, 2))}, d=("lora_bias", "a", made.floats(6), "bias"))
    yield "bias of no pair", [(stray, 1.0)], base, "no module 'a'"
    no_config = adapter({"a": one}, t=("tokens", "a", made.floats(2, 10), "weight"))
    yield "tokens", [(no_config, 1.0)], base, "the indices of these rows are unknown"


@pytest.mark.parametrize(
    ("name", "adapters", "base", "message"), list(refused()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_contradictions_are_errors(name, adapters, base, message):
    with pytest.raises(LoraLensError, match=message):
        planned(Case(base, adapters, {}))


def test_token_rows_are_counted_and_found_by_the_name_of_their_module():
    made = make()
    base = {"m.e.weight": made.weight(9, 4), "a.weight": made.weight(6, 10)}
    extra = {"t": Extra("tokens", "m.e", LazyArray.of(made.floats(2, 4)))}
    for said, fits in (
        ([1, 2], True),
        ({"e": [3, 4], "other": [1]}, True),
        ({"x": [3, 4]}, False),
        ([1], False),
        ([-1, 2], False),
    ):
        one = Adapter(modules={"a": made.pair(6, 10)}, extra=extra, config={"trainable_token_indices": said})
        if not fits:
            with pytest.raises(FormatError):
                planned(Case(base, [(one, 1.0)], {}))
            continue
        tokens = planned(Case(base, [(one, 1.0)], {})).tensors["m.e.weight"].tokens
        assert tokens.indices == tuple(said if isinstance(said, list) else said["e"])


def test_a_token_beyond_the_vocabulary_is_an_error():
    made = make()
    base = {"e.weight": made.weight(9, 4), "a.weight": made.weight(6, 10)}
    extra = {"t": Extra("tokens", "e", LazyArray.of(made.floats(1, 4)))}
    one = Adapter(modules={"a": made.pair(6, 10)}, extra=extra, config={"trainable_token_indices": [9]})
    with pytest.raises(MismatchError, match="token 9"):
        planned(Case(base, [(one, 1.0)], {}))


def test_the_head_of_a_tied_base_keeps_its_numbers_where_the_embedding_is_adapted():
    made, base = head_and_embedding()
    one = adapter({"model.embed_tokens": made.pair(4, 9, kind="embedding")})
    lazy = Case(base, [], {}).lazy
    found = plan_merge([(one, 1.0)], lazy, config=TIED)
    head = found.tensors["lm_head.weight"]
    assert (head.base, head.slabs) == (None, ())
    np.testing.assert_array_equal(head.source.read(), base["model.embed_tokens.weight"])
    assert dict(found.config) == {"tie_word_embeddings": False}
    assert found.notes == (
        "lm_head.weight: written as a weight of its own, 144 bytes more",
        "lm_head.weight keeps its numbers: the adapter changes model.embed_tokens.weight alone",
        "tie_word_embeddings is set to false",
    )
    assert "72 bytes more" in plan_merge([(one, 1.0)], lazy, config=TIED, dtype="bfloat16").notes[0]


def test_a_tie_that_the_adapter_keeps_is_kept():
    made, base = head_and_embedding()
    pair = made.pair(4, 9, kind="embedding")
    lazy = Case(base, [], {}).lazy
    alone, both = adapter({"model.embed_tokens": pair}), adapter({"model.embed_tokens": pair, "lm_head": turned(pair)})
    for one in (replace(alone, config={"ensure_weight_tying": True}), both):
        found = plan_merge([(one, 1.0)], lazy, config=TIED)
        assert list(found.tensors) == ["model.embed_tokens.weight"]
        assert found.notes == ("lm_head.weight shares the weight of model.embed_tokens.weight and changes with it",)
        untied = plan_merge([(one, 1.0)], lazy, config=TIED, untie=True).tensors
        assert len(untied["lm_head.weight"].slabs) == 1
    several = plan_merge([(alone, 1.0), (both, 0.5)], lazy, config=TIED)  # the head gets the second one's alone
    assert [len(several.tensors[key].slabs[0].terms) for key in ("model.embed_tokens.weight", "lm_head.weight")] == [
        2,
        1,
    ]


def turned(pair):
    return loralens.LowRank(pair.A.T, pair.B.T, pair.scale)


def test_float8_with_scales_is_not_half_replaced():
    made = make()
    one = adapter({"a": made.pair(6, 10)}, w=("saved", "b", made.floats(2, 3), "weight"))
    base = {"a.weight": streamed(made.weight(6, 10)), "b.weight": streamed(made.weight(2, 3))}
    with pytest.raises(MismatchError, match="float8 with scales"):
        plan_merge([(one, 1.0)], base, scales={"b.weight": base["b.weight"]})
