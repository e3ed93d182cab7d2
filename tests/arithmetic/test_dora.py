"""DoRA adapters combined: sums of what they change, against dense float64 and in PEFT."""

from dataclasses import replace

import numpy as np
import pytest

from loralens import Adapter, LowRank, MismatchError, OptionError, ShapeError
from loralens.arithmetic import combine_adapters
from loralens.core import Extra, Layout, LazyArray, Scaling, Weight
from tests import reference
from tests.draws import draw_factors
from tests.tolerances import COMBINED, DORA_FILE

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
SHAPES = {Q: (40, 30), V: (24, 36)}
KEY = "base_model.model.{}.lora_magnitude_vector"


@pytest.fixture
def base():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape) for name, shape in SHAPES.items()}


def weights(base, *, transposed=False):
    return {
        name: Weight(f"{name}.weight", LazyArray.of(np.ascontiguousarray(W.T) if transposed else W), transposed)
        for name, W in base.items()
    }


def adapter(seed, base, *, rank=3, dora=tuple(SHAPES), names=tuple(SHAPES), scale=2.0):
    """Pairs with trained magnitudes: lengths of W + L, some percent off."""
    rng = np.random.default_rng(seed)
    modules, extra = {}, {}
    for name in names:
        B, A = (0.3 * factor for factor in draw_factors(rng, *SHAPES[name], rank))
        modules[name] = LowRank(B, A, scale, scaling=Scaling("given"))
        if name in dora:
            lengths = np.linalg.norm(base[name] + modules[name].dense(), axis=1)
            m = lengths * (1 + 0.2 * rng.standard_normal(lengths.size))
            extra[KEY.format(name)] = Extra("magnitude", name, LazyArray.of(m))
    config = {"r": rank, "lora_alpha": rank * scale, "use_dora": bool(dora), "peft_type": "LORA"}
    return Adapter(modules=modules, extra=extra, config={**config, "target_modules": ["q_proj", "v_proj"]})


def change(one, name, W):
    """W' − W by the definition."""
    D = one[name].dense() if name in one else np.zeros_like(W)
    lengths = {e.module: e.tensor.read() for e in one.extra.values() if e.role == "magnitude"}
    return D if name not in lengths else reference.dora(W, D, lengths[name]) - W


def assert_is(found, expected, base, tolerance=COMBINED):
    for name, W in base.items():
        far = np.linalg.norm(change(found, name, W) - expected(name, W))
        assert far <= tolerance * np.linalg.norm(W), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("method", ["sum", "average"])
def test_a_sum_of_dora_adapters_is_dora_and_exact(base, method, transposed):
    a, b, c = adapter(1, base), adapter(2, base, rank=5, scale=-1.0), adapter(3, base, dora=())
    terms = [(a, 0.7), (b, 0.4), (c, 1.5)]
    found = combine_adapters(
        terms, method=method, dtype=np.float64, weights=weights(base, transposed=transposed), lam=0.8
    )
    share = 0.8 / (1 if method == "sum" else 2.6)

    def expected(name, W):
        return share * sum(w * change(one, name, W) for one, w in terms)

    # m' is float32, whose rounding is one of W
    assert_is(found.adapter, expected, base, DORA_FILE)
    assert {m.rank for m in found.adapter.modules.values()} == {11}
    for name, W in base.items():
        h = found.row_scalings.h[name]
        K = found.lifts[name].at(dtype=np.float64).dense() * (1 + h[:, None])
        assert np.linalg.norm(K + h[:, None] * W - expected(name, W)) < COMBINED * np.linalg.norm(W)
    assert all(one.tensor.dtype == np.float32 for one in found.adapter.extra.values())
    assert found.adapter.config["use_dora"] is True
    assert "2 of 3 adapters are DoRA" in found.notes[-1]


def test_quality_is_that_of_whole_changes_at_every_rank(base):
    a, b = adapter(6, base), adapter(7, base, dora=(Q,))
    for method, cut in (("sum", None), ("sum", 2), ("average", None), ("average", 3)):
        found = combine_adapters([(a, 0.7), (b, -0.4)], method=method, weights=weights(base))
        for name, W in base.items():
            quality, h = found.modules[name], found.row_scalings.h[name]
            K = (1 + h[:, None]) * found.lifts[name].at(cut, np.float64).dense()
            R = K + h[:, None] * W
            Ds = [change(one, name, W) for one in (a, b)]
            error, shares = reference.dense_quality(Ds, [0.7, -0.4], R)
            k = quality.s.size if cut is None else cut
            assert quality.error_to_sum(cut) == pytest.approx(error, rel=1e-9, abs=COMBINED)
            for t, share in enumerate(shares):
                energy = quality.energies[t]
                assert energy == pytest.approx(np.sum(Ds[t] ** 2), rel=1e-10)
                assert quality.inner[t, k] / energy == pytest.approx(share[1], rel=1e-9)
                assert quality.sum_inner[t] / energy - (0.7, -0.4)[t] == pytest.approx(share[2], rel=1e-9, abs=1e-12)
                lost = pair_lost((a, b)[t], name, W, K)
                assert quality.retained[t, k] == pytest.approx(energy - lost, rel=1e-9)


def pair_lost(one, name, W, K):
    """The energy of diag(g) L outside the directions of the pair K of the result."""
    D = one[name].dense()
    lengths = [e.tensor.read() for e in one.extra.values() if e.module == name]
    L = D * (lengths[0] / np.linalg.norm(W + D, axis=1))[:, None] if lengths else D
    U, _, V = reference.dense_triplets(K)
    return np.sum(L**2) - np.sum((U.T @ L @ V) ** 2)


def test_without_the_base_it_is_refused_with_the_way_out(base):
    a, b = adapter(15, base), adapter(16, base)
    with pytest.raises(MismatchError, match=r"is a DoRA adapter(.|\n)*base="):
        combine_adapters([(a, 1), (b, 1)])
    with pytest.raises(MismatchError, match=r"adapter 2: .*q_proj.*: the base has no weight for it"):
        combine_adapters([(adapter(17, base, dora=(V,)), 1), (b, 1)], weights={V: weights(base)[V]}, modules=["q_proj"])


def test_methods_that_look_at_the_updates_are_refused(base):
    a = adapter(18, base)
    for method in ("ties", "tsv-m", "model-stock"):
        with pytest.raises(OptionError, match=f"{method} does not combine DoRA"):
            combine_adapters([(a, 1), (a, 1)], method=method, weights=weights(base))
    assert combine_adapters(
        [(adapter(19, base, dora=()), 1), (adapter(20, base, dora=()), 1)], method="ties", weights={}
    )


def test_what_no_dora_adapter_can_say_is_refused(base):
    a = adapter(21, base)
    W = base[Q]
    lengths = np.linalg.norm(W + a[Q].dense(), axis=1)
    twice = {KEY.format(Q): Extra("magnitude", Q, LazyArray.of(2 * lengths))}  # g = 2: −1 times it takes W away
    with pytest.raises(MismatchError, match="40 rows would keep nothing of the base"):
        combine_adapters([(replace(a, extra=twice), -1.0)], weights=weights(base))
    wrong = {KEY.format(Q): Extra("magnitude", Q, LazyArray.of(np.ones(7)))}
    with pytest.raises(ShapeError, match="one number for each output"):
        combine_adapters([(replace(a, extra=wrong), 2.0)], weights=weights(base))
    by_input = {KEY.format(Q): Extra("magnitude_in", Q, LazyArray.of(np.ones(30)))}
    with pytest.raises(MismatchError, match=r"by input(.|\n)*loralens merge"):
        combine_adapters([(replace(a, extra=by_input), 2.0)], weights=weights(base))


def test_a_convolution_has_its_magnitudes_as_peft_shapes_them(base):
    layout = Layout("conv", (3, 3))
    rng = np.random.default_rng(25)
    pair = LowRank(*draw_factors(rng, 6, 36, 2), 1.0, layout=layout)
    a = Adapter(modules={"conv": pair}, extra={"m": Extra("magnitude", "conv", LazyArray.of(np.ones((1, 6, 1, 1))))})
    W = rng.standard_normal((6, 36))
    there = {"conv": Weight("conv.weight", LazyArray.of(W), transposed=False)}
    plain = Adapter(modules={"conv": pair})
    found = combine_adapters([(plain, 1.0), (replace(a, format="kohya"), 1.0)], weights=there).adapter
    ((key, extra),) = found.extra.items()
    assert (key, extra.tensor.shape) == (KEY.format("conv"), (1, 6, 1, 1))


def test_peft_gives_the_outputs_of_the_sum(base, tmp_path):
    """Two adapters that PEFT itself made DoRA, saved, combined and loaded again: outputs add up."""
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model

    import loralens

    torch.manual_seed(0)

    def model():
        torch.manual_seed(1)
        return torch.nn.ModuleDict({"q": torch.nn.Linear(30, 40), "v": torch.nn.Linear(30, 24)}).requires_grad_(False)

    x = torch.randn(5, 30)
    plain, changes = model(), []
    for seed, rank in ((2, 3), (3, 4)):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank, lora_alpha=8, target_modules=["q", "v"], use_dora=seed != 3, init_lora_weights=False
        )
        one = get_peft_model(model(), config)
        with torch.no_grad():
            for name, p in one.named_parameters():
                if "magnitude" in name:
                    p.mul_(1 + 0.1 * torch.randn_like(p))
        one.save_pretrained(tmp_path / str(seed))
        changes.append({n: (one.base_model.model[n](x) - plain[n](x)).detach().numpy() for n in "qv"})
    adapters = [loralens.load(tmp_path / s) for s in "23"]
    there = {
        name: Weight(f"{name}.weight", LazyArray.of(plain[name].weight.numpy()), transposed=False) for name in "qv"
    }
    for order in (0, 1):  # the first is DoRA, or the second
        pair = [(adapters[order], 0.6), (adapters[1 - order], -0.3)]
        result = combine_adapters(pair, weights=there).adapter
        loralens.save(result, tmp_path / "out", overwrite=True)
        live = PeftModel.from_pretrained(model(), tmp_path / "out")
        for name in "qv":
            got = (live.base_model.model[name](x) - plain[name](x)).detach().numpy()
            expected = 0.6 * changes[order][name] - 0.3 * changes[1 - order][name]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
