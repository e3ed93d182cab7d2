"""combine: the identities of a sum of updates, what it says of each adapter, what rides along, what is refused."""

import ml_dtypes
import numpy as np
import pytest

from loralens import Adapter, LowRank, MismatchError, OptionError, ShapeError
from loralens.arithmetic import combine_adapters
from loralens.core import Dense, Extra, Layout, LazyArray, Scaling, Strength, Structured
from tests import reference
from tests.draws import draw_factors
from tests.tolerances import COMBINED

SHAPES = {"model.layers.0.self_attn.q_proj": (12, 9), "model.layers.1.self_attn.v_proj": (8, 14)}
Q, V = SHAPES


def made(seed, *, rank=3, alpha=8.0, rule="alpha/r", names=SHAPES, dtype=np.float64, extra=None, **fields):
    rng = np.random.default_rng(seed)
    scaling = Scaling(rule, alpha, rank)
    modules = {
        name: LowRank(*draw_factors(rng, *SHAPES.get(name, (12, 9)), rank, dtype), scaling.value, scaling=scaling)
        for name in names
    }
    return Adapter(modules=modules, extra=extra or {}, **fields)


def total(*terms):
    names = {name for adapter, _ in terms for name in adapter}
    return {name: sum(w * adapter[name].dense() for adapter, w in terms if name in adapter) for name in names}


def assert_equals(adapter, dense, tolerance=COMBINED):
    assert set(adapter) == set(dense)
    for name, D in dense.items():
        size = max(np.linalg.norm(D), 1.0)
        assert np.linalg.norm(adapter[name].dense() - D) <= tolerance * size, name


def extra(role, module=Q, value=1.0, size=12):
    return Extra(role, module, LazyArray.of(np.full(size, value)))


@pytest.mark.parametrize("method", ["sum", "ties", "slerp"])
@pytest.mark.parametrize("other", [ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e4m3fn])
def test_factors_of_different_dtypes_are_combined_without_rounding(method, other):
    narrow = [(made(1, dtype=np.float16), 0.7), (made(2, dtype=other), 0.3)]
    pairs = [{name: [x.read().astype(float) for x in m.factors] for name, m in one.items()} for one, _ in narrow]
    wide = [
        (Adapter(modules={name: LowRank(*pair, one[name].scale) for name, pair in held.items()}), weight)
        for held, (one, weight) in zip(pairs, narrow, strict=True)
    ]
    found, expected = (combine_adapters(terms, method=method, dtype=np.float64).adapter for terms in (narrow, wide))
    assert_equals(found, {name: module.dense() for name, module in expected.items()})


@pytest.mark.parametrize(
    "one",
    [
        made(0, rank=4, alpha=16.0),
        made(1, rank=4, alpha=8.0, rule="alpha/sqrt(r)"),
        made(2, alpha=-3.0),
        made(3, dtype=ml_dtypes.bfloat16),
    ],
    ids=["alpha is not r", "rslora", "negative", "bf16"],
)
def test_one_adapter_of_weight_1_is_the_same_to_the_bit(one):
    found = combine_adapters([(one, 1.0)])
    for name, module in one.items():
        assert found.adapter[name] is module
    assert found.total().error_to_sum < COMBINED


def test_what_cancels_is_exact_zeros_and_can_be_left_out():
    one = made(6, dtype=np.float32)
    found = combine_adapters([(one, 0.3), (one, -0.3)])
    assert all((m.rank, m.B.any(), m.A.any()) == (1, False, False) for m in found.adapter.modules.values())
    assert found.total().error_to_sum == 0
    partly = combine_adapters([(one, 1.0), (one, {Q: -1.0, V: 0.5})], drop_dead=True)
    assert list(partly.adapter) == [V]
    assert partly.adapter.narrowed
    assert set(partly.modules) == {Q, V}
    with pytest.raises(OptionError, match="nothing is left"):
        combine_adapters([(one, 1), (one, -1)], drop_dead=True)


def test_modules_that_only_some_have_and_other_names_for_them():
    first = made(11)
    names = {name.replace(".", "_"): name for name in SHAPES}
    other = Adapter(modules={f"lora_unet_{short}": made(12)[name] for short, name in names.items()}, format="kohya")
    third = made(13, names=[V, "model.layers.2.self_attn.k_proj"])
    found = combine_adapters([(first, 1.0), (other, 0.5), (third, 2.0)])
    renamed = Adapter(modules={name: made(12)[name] for name in SHAPES})
    assert_equals(found.adapter, total((first, 1.0), (renamed, 0.5), (third, 2.0)))
    assert found.adapter["model.layers.2.self_attn.k_proj"].B is third["model.layers.2.self_attn.k_proj"].B
    assert found.adapter["model.layers.2.self_attn.k_proj"].scale == 2 * third[V].scale


def test_weights_by_glob_last_match_counts_and_modules_restrict():
    a, b = made(14), made(15)
    found = combine_adapters([(a, 1.0), (b, Strength(0.5, {"*": 2.0, "v_proj": -1.0}))])
    assert_equals(found.adapter, {name: total((a, 1), (b, 2.0 if name == Q else -1.0))[name] for name in SHAPES})
    assert list(combine_adapters([(a, 1), (b, 1)], modules=["q_proj"]).adapter) == [Q]
    only = made(16, names=[Q, "model.layers.5.self_attn.q_proj"])
    assert set(combine_adapters([(a, 1.0), (only, Strength(0.0, {Q: 1.0}))]).adapter) == set(a)
    with pytest.raises(OptionError, match="no module matches"):
        combine_adapters([(a, 1.0), (b, {"k_proj": 2.0})])


def test_quality_is_that_of_the_dense_matrices_at_every_rank():
    a, b = made(17, rank=3), made(18, rank=4, alpha=-5.0)
    for method in ("sum", "tsv-m", "iso-c", "slerp"):
        found = combine_adapters([(a, 0.7), (b, 0.4)], method=method, lam=1.3)
        for cut in (None, 2):
            lifts = found.lifts
            results = {n: lifts[n].at(cut, np.float64).dense() for n in found.adapter}
            shares = found.total(None if cut is None else dict.fromkeys(SHAPES, cut))
            errors, energies = 0.0, 0.0
            for name, R in results.items():
                error, _ = reference.dense_quality([a[name].dense(), b[name].dense()], [0.7, 0.4], R)
                assert found.modules[name].error_to_sum(cut) == pytest.approx(error, rel=1e-9, abs=COMBINED)
                whole = np.sum(reference.dense_sum([a[name].dense(), b[name].dense()], [0.7, 0.4]) ** 2)
                errors, energies = errors + error**2 * whole, energies + whole
            assert shares.error_to_sum == pytest.approx(np.sqrt(errors / energies), rel=1e-9, abs=COMBINED)
            # block-diagonal: a whole adapter as one matrix has the sums over its modules
            dense = [np.block([[m[Q].dense(), np.zeros((12, 14))], [np.zeros((8, 9)), m[V].dense()]]) for m in (a, b)]
            R = np.block([[results[Q], np.zeros((12, 14))], [np.zeros((8, 9)), results[V]]])
            expected = reference.dense_quality(dense, [0.7, 0.4], R)[1]
            for m, D, share, whole in zip((a, b), dense, shares.shares, expected, strict=True):
                got = (share.gain, share.interference_before, share.interference_after)
                assert got == pytest.approx(whole[1:], rel=1e-9, abs=1e-12)
                inside = [
                    reference.dense_quality([m[n].dense()], [1.0], results[n])[1][0][0] * np.sum(m[n].dense() ** 2)
                    for n in SHAPES
                ]
                assert share.retained == pytest.approx(sum(inside) / np.sum(D**2), rel=1e-9)


def stack(seed, ranks):
    rng = np.random.default_rng(seed)
    return {
        f"mlp.experts.up[{i}]": LowRank(*draw_factors(rng, 6, 5, r), 2.0, layout=Layout("experts"))
        for i, r in enumerate(ranks)
    }


def test_the_experts_of_a_stack_keep_one_rank():
    one, other = stack(0, [2, 2, 2]), stack(1, [3, 3, 3])
    other["mlp.experts.up[1]"] = LowRank(np.zeros((6, 3)), np.ones((3, 5)), 2.0, layout=Layout("experts"))
    a, b = Adapter(modules=one), Adapter(modules=other)
    found = combine_adapters([(a, 1), (b, 1)])
    assert {m.rank for m in found.adapter.modules.values()} == {5}
    assert_equals(found.adapter, total((a, 1), (b, 1)))
    kept = combine_adapters([(a, -2.0)])  # alone they stay as they are, together
    assert all(kept.adapter[name].B is a[name].B for name in a)
    assert all(m.layout.kind == "experts" for m in found.adapter.modules.values())


def test_full_tensors_of_one_ride_along_and_of_several_need_a_choice():
    heads = [{"head": extra("saved", "score", value)} for value in (1.0, 2.0)]
    plain, one, other = made(28), made(29, extra=heads[0]), made(30, extra=heads[1])
    assert combine_adapters([(plain, 1), (one, 0.5)]).adapter.extra["head"].tensor.read()[0] == 1
    assert "whatever its weight" in combine_adapters([(plain, 1), (one, 0.5)]).notes[0]
    assert set(combine_adapters([(one, 1), (one, 1)]).adapter.extra) == {"head"}  # the same tensors to the bit
    with pytest.raises(MismatchError, match=r"adapter 1, adapter 2 each have .*: score\n.*take="):
        combine_adapters([(one, 1), (other, 1)])
    taken = combine_adapters([(one, 1), (other, 1)], take=1)
    assert taken.adapter.extra["head"].tensor.read()[0] == 2
    assert "left out of adapter 1" in taken.notes[0]
    assert taken.recipe.take == "adapter 2"
    assert not combine_adapters([(one, 1), (other, 1)], take="none").adapter.extra


def test_differences_add_up():
    one, other = (made(s, extra={"d": extra("diff_b", Q, v)}) for s, v in ((33, 1.0), (34, 10.0)))
    found = combine_adapters([(one, 2.0), (other, Strength(1.0, {"q_proj": -1.0}))])
    np.testing.assert_array_equal(found.adapter.extra["d"].tensor.read(), np.full(12, -8.0))
    assert combine_adapters([(one, 1.0)]).adapter.extra["d"].tensor is one.extra["d"].tensor
    np.testing.assert_array_equal(combine_adapters([(one, -3.0)]).adapter.extra["d"].tensor.read(), np.full(12, -3.0))
    shorter = made(35, extra={"d": extra("diff_b", Q, size=8)})
    with pytest.raises(MismatchError, match="several shapes"):
        combine_adapters([(one, 1.0), (shorter, 1.0)])


@pytest.mark.parametrize(
    ("role", "message"),
    [("magnitude", "DoRA"), ("magnitude_in", "DoRA"), ("lora_bias", "bias on B"), ("diagonal", "KaSA")],
)
def test_what_bends_an_update_is_refused_with_the_way_out(role, message):
    bent = made(35, extra={"x": extra(role)})
    assert set(combine_adapters([(bent, 1.0)]).adapter.extra) == {"x"}
    assert not combine_adapters([(bent, 1.0)], modules=["v_proj"]).adapter.extra  # it goes with its module
    with pytest.raises(MismatchError, match=rf"{message}.*\n  fix: "):
        combine_adapters([(made(36), 1.0), (bent, 1.0)])
    if role.startswith("magnitude"):
        with pytest.raises(MismatchError, match=message):
            combine_adapters([(bent, {"q_proj": 2.0})])


def test_updates_that_are_no_pair_and_grouped_convolutions_are_refused():
    full = Adapter(modules={Q: Structured(Dense(LazyArray.of(np.ones((12, 9)))))})
    with pytest.raises(MismatchError, match=r"adapter 2: model.*full difference.*\n  fix: .*convert --rank"):
        combine_adapters([(made(37), 1), (full, 1)])
    grouped = made(38).map(lambda m: LowRank(m.B, m.A, m.scale, layout=Layout("conv", (1, 1), 3)))
    with pytest.raises(MismatchError, match="grouped convolution"):
        combine_adapters([(grouped, 1), (grouped, 1)])
    assert combine_adapters([(grouped, 2.0)]).adapter[Q].layout.groups == 3


def test_adapters_of_two_models_are_refused():
    other = made(39, names=["encoder.layer.0.query", "encoder.layer.0.key"])
    with pytest.raises(
        MismatchError, match=r"no module in common: a has 2 modules \(q_proj, v_proj\).* b has 2 .*query"
    ):
        combine_adapters([(made(40), 1), (other, 1)], labels=["a", "b"])
    shaped = Adapter(modules={Q: LowRank(np.ones((5, 2)), np.ones((2, 9)))})
    with pytest.raises(ShapeError, match=r"q_proj is 12 × 9 in a and 5 × 9 in b: they belong to two base models"):
        combine_adapters([(made(41), 1), (shaped, 1)], labels=["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "wrong"}, r"no method 'wrong'\n  fix: choose one of: sum \(.*; tsv-m \("),
        ({"method": "slerp"}, "slerp takes 2 adapters, not 1"),
        ({"method": "sum", "density": 0.5}, "no option density"),
        ({"space": "moon"}, "no space"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(OptionError, match=message):
        combine_adapters([(made(42), 1)], **arguments)
    with pytest.raises(OptionError, match="at least 1"):
        combine_adapters([])
