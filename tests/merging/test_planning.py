"""What a merge will do to which tensor, and what it refuses: nothing an adapter carries is left without a word."""

import numpy as np
import pytest

import loralens
from loralens import Adapter, FormatError, LoraLensError, MismatchError
from loralens.core import Extra, Finding, LazyArray
from loralens.merging.planning import CHANGED_BASE
from tests.merging.made import Case, Maker, adapter, linear, streamed
from tests.merging.merged import plan_merge


def planned(case, **options):
    return plan_merge(case.adapters, case.lazy, **case.options, **options)


def make():
    return Maker(1, np.float32)


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
    base = {"a.weight": W, "h.weight": made.weight(2, 6), "c.weight": made.weight(4, 3, 2, 2), "a.bias": made.weight(6)}
    yield "two magnitudes", [(dora, 1.0), (dora, 1.0)], base, "two adapters give a magnitude"
    yield "lengths", [(adapter({"a": one}, m=("magnitude", "a", made.floats(5), "weight")), 1.0)], base, "5 magnitudes"
    four = adapter(
        {"c": made.pair(4, 12, kind="conv", kernel=(2, 2))}, m=("magnitude_in", "c", made.floats(4), "weight")
    )
    yield "channels", [(four, 1.0)], base, "4 magnitudes for 3 vectors"
    grouped = loralens.LowRank(
        made.floats(4, 2), made.floats(2, 12), 1.0, layout=made.pair(4, 12, kind="conv", groups=2).layout
    )
    yield "groups", [(adapter({"c": grouped}), 1.0)], base, "grouped convolution"
    turned = adapter({"c": made.pair(4, 12, kind="conv", kernel=(2, 2))}, d=("diff", "a", made.floats(10, 6), "weight"))
    yield "turned difference", [(turned, 1.0)], base, r"d \(10, 6\) cannot be added to a\.weight \(6, 10\)"
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


def test_a_token_beyond_the_vocabulary_is_an_error():
    made = make()
    base = {"e.weight": made.weight(9, 4), "a.weight": made.weight(6, 10)}
    extra = {"t": Extra("tokens", "e", LazyArray.of(made.floats(1, 4)))}
    one = Adapter(modules={"a": made.pair(6, 10)}, extra=extra, config={"trainable_token_indices": [9]})
    with pytest.raises(MismatchError, match="token 9"):
        planned(Case(base, [(one, 1.0)], {}))


def test_float8_with_scales_is_not_half_replaced():
    made = make()
    one = adapter({"a": made.pair(6, 10)}, w=("saved", "b", made.floats(2, 3), "weight"))
    base = {"a.weight": streamed(made.weight(6, 10)), "b.weight": streamed(made.weight(2, 3))}
    with pytest.raises(MismatchError, match="float8 with scales"):
        plan_merge([(one, 1.0)], base, scales={"b.weight": base["b.weight"]})
