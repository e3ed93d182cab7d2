"""An adapter from two checkpoints: against dense SVDs, in every kind of weight, and nothing lost without a word."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, OptionError, Rule
from loralens.core import LazyArray
from loralens.merging import extract_adapter
from loralens.merging.checkpoint_difference import NoiseEdge
from tests import reference
from tests.draws import draw_basis, draw_factors
from tests.marks import examples, slow_except
from tests.merging.merged import merge_all
from tests.tolerances import EXTRACTED


def lazy(tensors):
    return {key: LazyArray.of(array) for key, array in tensors.items()}


def full(rng, rows, columns, decay=0.9):
    """A matrix whose singular values fall by a constant factor."""
    U, V = (draw_basis(rng, n, min(rows, columns)) for n in (rows, columns))
    return (U * decay ** np.arange(min(rows, columns))) @ V.T


def weights(rng, *shape, dtype=np.float32):
    return (0.02 * rng.standard_normal(shape)).astype(dtype)


def pair_of(rng, *, rows=40, columns=30, decay=0.8, dtype=np.float32, count=2):
    """Checkpoints of some linear layers that differ by full-rank matrices of falling values."""
    base = {f"blocks.{i}.q.weight": weights(rng, rows, columns, dtype=dtype) for i in range(count)}
    tuned = {
        key: (W.astype(np.float64) + 0.01 * (i + 1) * full(rng, rows, columns, decay)).astype(dtype)
        for i, (key, W) in enumerate(base.items())
    }
    return base, tuned


@given(
    st.integers(1, 30),
    st.integers(1, 30),
    st.sampled_from([Rule("rank", 3), Rule("energy", 0.9), Rule("error", 0.2), Rule("sv-ratio", 4)]),
    st.sampled_from([(np.float32, np.float32), (np.float32, ml_dtypes.bfloat16), (np.float16, np.float32)]),
    st.integers(0, 2**32 - 1),
)
@examples(40)
def test_a_pair_is_the_best_of_its_rank_and_the_error_is_true(rows, columns, rule, dtypes, seed):
    rng = np.random.default_rng(seed)
    W = weights(rng, rows, columns, dtype=dtypes[0])
    T = (W.astype(np.float64) + 0.1 * full(rng, rows, columns, 0.7)).astype(dtypes[1])
    D = T.astype(np.float64) - W.astype(np.float64)
    found = extract_adapter(lazy({"a.q.weight": W}), lazy({"a.q.weight": T}), rule)
    module, told = found.adapter["a.q"], found.modules["a.q"]
    s = np.linalg.svd(D, compute_uv=False)
    assert module.rank == told.rank == rule.rank_of(s[s > 0])
    assert module.scale == 1
    best = reference.truncated_error(D, module.rank)[0]
    assert told.relative_error == pytest.approx(best, abs=EXTRACTED)
    assert np.linalg.norm(D - module.dense()) / np.linalg.norm(D) == pytest.approx(told.relative_error, abs=1e-12)
    assert told.frobenius == pytest.approx(np.linalg.norm(D))
    assert told.svd_error == 0


RULES = [Rule("rank", 20), Rule("energy", 0.98), Rule("error", 0.1), NoiseEdge()]


@pytest.mark.parametrize("rule", slow_except(RULES, RULES[0]))
def test_big_matrices_take_a_randomised_svd_and_say_how_good_it_is(rule):
    rng = np.random.default_rng(2)
    W = weights(rng, 700, 560, dtype=ml_dtypes.bfloat16)
    T = (W.astype(np.float64) + 0.5 * full(rng, 700, 560, 0.9)).astype(ml_dtypes.bfloat16)
    base, tuned = lazy({"a.q.weight": W}), lazy({"a.q.weight": T})
    quick, dense = (extract_adapter(base, tuned, rule, exact=exact).modules["a.q"] for exact in (False, True))
    assert abs(quick.rank - dense.rank) <= isinstance(rule, NoiseEdge)  # one value lies on the edge
    assert quick.rank > 16 or isinstance(rule, NoiseEdge)
    assert 0 < quick.svd_error < 2e-3
    assert dense.svd_error == 0
    assert quick.relative_error == pytest.approx(dense.relative_error, rel=1e-3 if quick.rank == dense.rank else 0.01)
    assert quick.relative_error >= dense.relative_error * (1 - EXTRACTED)


def planted(rng, dtype, *, rows=400, columns=300, strength=0.02, rank=5, scale=0.02):
    W = (scale * rng.standard_normal((rows, columns))).astype(dtype)
    B, A = draw_factors(rng, rows, columns, rank)
    D = B @ A
    D *= strength * np.linalg.norm(W.astype(np.float64)) / np.linalg.norm(D)
    return W, (W.astype(np.float32) + D.astype(np.float32)).astype(dtype), D


@pytest.mark.parametrize(("dtype", "strength"), [(ml_dtypes.bfloat16, 0.01), (np.float16, 0.01), (np.float32, 1e-4)])
def test_the_noise_edge_of_rounding_keeps_the_directions_that_were_merged(dtype, strength):
    rng = np.random.default_rng(5)
    W, T, D = planted(rng, dtype, strength=strength)
    still = weights(rng, 400, 300, dtype=dtype)
    base, tuned = lazy({"a.q.weight": W, "a.v.weight": still}), lazy({"a.q.weight": T, "a.v.weight": still})
    found = extract_adapter(base, tuned, NoiseEdge())
    told = found.modules["a.q"]
    assert (told.rank, found.unchanged) == (5, 1)
    lost = np.linalg.norm(T.astype(np.float64) - W.astype(np.float64) - D)
    got = np.linalg.norm(found.adapter["a.q"].dense() - D)
    assert got < 0.3 * lost  # most of the noise is gone
    assert told.residue == pytest.approx(1, abs=0.05)


def test_the_median_tells_unknown_noise_of_full_rank():
    rng = np.random.default_rng(7)
    for shape in ((300, 400), (600, 560)):  # dense, and by way of the Gram matrix
        W = np.zeros(shape, np.float32)
        D = 0.01 * rng.standard_normal(shape)
        u, v = (draw_basis(rng, n, 3) for n in shape)
        D += u @ np.diag([2.0, 1.5, 1.0]) @ v.T
        base, tuned = lazy({"a.q.weight": W}), lazy({"a.q.weight": D.astype(np.float32)})
        told = extract_adapter(base, tuned, NoiseEdge("median")).modules["a.q"]
        assert told.rank == 3
        s = np.linalg.svd(D, compute_uv=False)
        beta = min(shape) / max(shape)
        edge = reference.best_threshold(beta) / reference.marchenko_pastur_middle(beta) ** 0.5 * np.median(s)
        assert told.edge == pytest.approx(edge, rel=1e-5)
        assert told.residue > 100


def test_every_kind_of_weight_gets_its_orientation():
    rng = np.random.default_rng(8)
    base = {
        "h.0.c_attn.weight": weights(rng, 6, 18),
        "conv.weight": weights(rng, 6, 3, 2, 2),
        "wte.weight": weights(rng, 20, 6),
        "h.0.experts.gate_up_proj": weights(rng, 3, 6, 10),
        "h.0.experts.down_proj": weights(rng, 3, 5, 6),
        "t.table": weights(rng, 5, 7),
    }
    tuned = {key: W + weights(rng, *W.shape) for key, W in base.items()}
    tuned["h.0.experts.down_proj"][1] = base["h.0.experts.down_proj"][1]
    found = extract_adapter(
        lazy(base), lazy(tuned), Rule("energy", 1), modules=["*"], conv1d=True, tuned_config={"hidden_size": 6}
    )
    adapter = found.adapter
    assert {name: (module.shape, module.layout.kind) for name, module in adapter.items()} == {
        "conv": ((6, 12), "conv"),
        "h.0.c_attn": ((18, 6), "linear"),
        "wte": ((6, 20), "embedding"),
        "t.table": ((5, 7), "parameter"),
        **{f"h.0.experts.gate_up_proj[{e}]": ((10, 6), "experts") for e in range(3)},
        **{f"h.0.experts.down_proj[{e}]": ((6, 5), "experts") for e in range(3)},
    }
    assert len({adapter[f"h.0.experts.down_proj[{e}]"].rank for e in range(3)}) == 1
    assert not adapter["h.0.experts.down_proj[1]"].dense().any()
    (note,) = found.notes  # of the convolution alone
    assert note.startswith("1 convolutions are treated as ones without groups")
    merged = merge_all([(adapter, 1.0)], lazy(base), conv1d=True)
    for key, got in merged.items():
        np.testing.assert_allclose(got, tuned[key], atol=1e-7)
    assert set(merged) == set(base)


def norm(rng, n):
    return {"weight": 1 + weights(rng, n), "bias": weights(rng, n)}


def model(rng):
    return {
        "encoder.0.q.weight": weights(rng, 8, 8), "encoder.0.q.bias": weights(rng, 8),
        "encoder.0.v.weight": weights(rng, 8, 8), "encoder.0.v.bias": weights(rng, 8),
        **{f"encoder.0.norm.{part}": array for part, array in norm(rng, 8).items()},
        "embeddings.word_embeddings.weight": weights(rng, 20, 8),
        "embed_tokens.weight": weights(rng, 20, 8),
        "depthwise.weight": weights(rng, 8, 1, 3),
        "position_ids": np.arange(20)[None],
        "cls_token": weights(rng, 1, 1, 8),
        "pooler.weight": weights(rng, 8, 8),
    }  # fmt: skip


def test_what_is_no_matrix_rides_along_or_is_named():
    rng = np.random.default_rng(9)
    base = model(rng)
    tuned = {f"net.{key}": array.copy() for key, array in base.items() if key != "pooler.weight"}
    for key in ("q.weight", "q.bias", "v.bias", "norm.weight"):
        tuned[f"net.encoder.0.{key}"] += 1
    for key in ("embeddings.word_embeddings.weight", "depthwise.weight", "position_ids", "cls_token"):
        tuned[f"net.{key}"] += 1
    tuned["net.embed_tokens.weight"] = weights(rng, 22, 8)
    tuned |= {"head.weight": weights(rng, 2, 8), "head.bias": weights(rng, 2), "net.encoder.0.q.extra": weights(rng, 3)}
    found = extract_adapter(lazy(base), lazy(tuned), Rule("rank", 2))
    prefix = "base_model.model."
    assert list(found.adapter) == ["net.encoder.0.q"]
    assert {key: (one.role, one.module, one.parameter) for key, one in found.adapter.extra.items()} == {
        f"{prefix}net.encoder.0.q.base_layer.bias": ("bias", "net.encoder.0.q", "bias"),
        f"{prefix}net.encoder.0.v.bias": ("bias", "net.encoder.0.v", "bias"),
        f"{prefix}net.encoder.0.norm.weight": ("saved", "net.encoder.0.norm", "weight"),
        f"{prefix}net.encoder.0.norm.bias": ("saved", "net.encoder.0.norm", "bias"),
        f"{prefix}net.depthwise.weight": ("saved", "net.depthwise", "weight"),
        f"{prefix}head.weight": ("saved", "head", "weight"),
        f"{prefix}head.bias": ("saved", "head", "bias"),
        f"{prefix}net.embed_tokens.weight": ("embedding", "net.embed_tokens", "weight"),
    }
    assert found.adapter.config["modules_to_save"] == ["head", "net.depthwise", "net.encoder.0.norm"]
    assert found.adapter.config["bias"] == "all"
    assert {one.key: one.why for one in found.left_out} == {
        "net.embeddings.word_embeddings": "an embedding: select it with --modules",
        "net.position_ids": "is not the weight of a layer, and no module can be saved for it",
        "net.cls_token": "is not the weight of a layer, and no module can be saved for it",
        "net.encoder.0.q.extra": "PEFT cannot add it to a layer that the base already has",
    }
    assert found.share == pytest.approx(64 / (64 + 160))
    assert found.notes == (
        "net.embed_tokens.weight: vocabulary resized from 20 to 22 rows, kept in full",
        "names match after adding 'net.' to the names of the base",
        "1 tensors of the base are not in the tuned model: pooler.weight",
    )
    assert found.unchanged == 1


def test_errors():
    rng = np.random.default_rng(14)
    base, tuned = pair_of(rng)
    with pytest.raises(OptionError, match="no matrix differs"):
        extract_adapter(lazy(base), lazy(base), Rule("rank", 1))
    with pytest.raises(OptionError, match="share no weight matrix"):
        extract_adapter(lazy(base), lazy({"x.weight": base["blocks.0.q.weight"]}), Rule("rank", 1))
    with pytest.raises(OptionError, match="no module matches"):
        extract_adapter(lazy(base), lazy(tuned), Rule("rank", 1), modules=["k"])
    with pytest.raises(OptionError, match="share of the parameters"):
        extract_adapter(lazy(base), lazy(tuned), Rule("parameters", 0.5))
    with pytest.raises(OptionError, match="too few"):
        extract_adapter(lazy(base), lazy(tuned), Rule("bytes", 10))
    tuned["blocks.1.q.weight"][3, 3] = np.inf
    with pytest.raises(FormatError, match=r"blocks\.1\.q: the difference holds NaN"):
        extract_adapter(lazy(base), lazy(tuned), Rule("rank", 1))


def test_errors_of_all_pairs_together_and_the_energy_they_keep():
    rng = np.random.default_rng(7)
    base, tuned = pair_of(rng, count=3)
    found = extract_adapter(lazy(base), lazy(tuned), Rule("rank", 2))
    D = {key.removesuffix(".weight"): tuned[key].astype(float) - base[key].astype(float) for key in base}
    lost = {name: np.linalg.norm(D[name] - found.adapter[name].dense()) for name in D}
    whole = np.sqrt(sum(np.linalg.norm(one) ** 2 for one in D.values()))
    assert found.relative_error == pytest.approx(np.sqrt(sum(x**2 for x in lost.values())) / whole, rel=1e-6)
    for name, told in found.modules.items():
        assert told.energy_kept == pytest.approx(1 - (lost[name] / np.linalg.norm(D[name])) ** 2, rel=1e-6)
