"""Every method against the same rule written out for dense matrices, and what the methods promise."""

import numpy as np
import pytest

from loralens import LowRank, OptionError
from loralens.arithmetic import METHODS
from loralens.core.joint import Joint
from tests import reference
from tests.draws import draw_factors
from tests.tolerances import COMBINED, COMBINED_ITERATED

CASES = {  # name → the dense rule, options of both, tolerance
    "sum": (reference.dense_sum, {}, COMBINED),
    "average": (reference.dense_average, {}, COMBINED),
    "slerp": (reference.dense_slerp, {}, COMBINED),
    "karcher": (reference.dense_karcher, {}, COMBINED_ITERATED),
    "model-stock": (reference.dense_model_stock, {}, COMBINED),
    "equal-norms": (reference.dense_equal_norms, {"beta": 0.3}, COMBINED),
    "cart": (reference.dense_cart, {"rank": 2}, COMBINED),
    "tsv-m": (reference.dense_tsv_m, {}, COMBINED_ITERATED),
    "iso-c": (reference.dense_iso_c, {}, COMBINED_ITERATED),
    "iso-cts": (reference.dense_iso_cts, {"common": 0.5}, COMBINED_ITERATED),
    "ctm": (reference.dense_ctm, {"rank": 3}, COMBINED_ITERATED),
    "null-space": (reference.dense_null_space, {}, COMBINED),
    "pico": (reference.dense_pico, {}, COMBINED),
    "knots": (reference.dense_knots_sum, {}, COMBINED),
}
EXACT = [name for name, row in METHODS.items() if not row.spaces]
SIGNED = (
    "sum",
    "model-stock",
    "equal-norms",
    "cart",
    "tsv-m",
    "iso-c",
    "iso-cts",
    "ctm",
    "null-space",
    "pico",
    "knots",
)


def adapters(seed, ranks, shape=(40, 30)):
    """Updates that share some of their directions, of mixed ranks, scales and dtypes."""
    rng = np.random.default_rng(seed)
    common_B, common_A = draw_factors(rng, *shape, 2)
    found = []
    for i, r in enumerate(ranks):
        scale, k = (1.0, 2.0, -0.5)[i % 3], min(r, 2)
        B, A = draw_factors(rng, *shape, r)
        B[:, :k] += common_B[:, :k]
        A[:k] += common_A[:k]
        found.append(LowRank(B.astype((np.float64, np.float32)[i % 2]), np.sign(scale) * A, scale))
    return found


def result(name, updates, weights, **options):
    joint = Joint.of(updates, weights)
    return joint.lift(METHODS[name].rule(joint, **METHODS[name].settings(options)), np.float64).dense()


def far(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("ranks", [(20, 20), (2, 5), (1, 3, 6)])
@pytest.mark.parametrize("name", EXACT)
def test_a_method_is_its_dense_rule(name, ranks):
    dense, options, tolerance = CASES[name]
    count = METHODS[name].adapters or len(ranks)
    updates = adapters(sum(ranks), ranks[:count])
    for weights in ([0.7, 0.3, 1.2], *([[1.0, -0.6, 0.4]] if name in SIGNED else [])):
        weights = weights[:count]
        expected = dense([u.dense() for u in updates], weights, **options)
        if not np.any(expected):
            assert not result(name, updates, weights, **options).any()
            continue
        assert far(result(name, updates, weights, **options), expected) < tolerance
        assert far(result(name, updates, weights, lam=-1.5, **options), -1.5 * expected) < tolerance or name == "cart"


@pytest.mark.parametrize("name", EXACT)
def test_a_missing_or_dead_update_does_no_harm(name):
    first, second = adapters(6, (3, 2))
    for other in (None, LowRank(0 * second.B, second.A)):
        found = result(name, [first, other], [1.0, 1.0])
        assert np.isfinite(found).all()
        zero = LowRank(0 * first.B, first.A)
        assert not result(name, [zero, None], [1.0, 1.0]).any()


@pytest.mark.parametrize("name", [name for name in EXACT if name in SIGNED])
def test_what_cancels_is_zero_where_the_rule_is_of_the_sum(name):
    update = adapters(8, (4,))[0]
    found = result(name, [update, update], [1.0, -1.0])
    if name in ("iso-cts", "null-space", "cart", "tsv-m"):
        assert np.isfinite(found).all()  # these look at the updates one by one
    else:
        assert not found.any()


@pytest.mark.parametrize("name", ["iso-c", "iso-cts"])
def test_a_flat_spectrum_is_cut_in_the_order_of_the_sum(name):
    """All σ are equal: without an order the LAPACK driver would choose what stays."""
    updates = adapters(12, (4, 4))
    joint = Joint.of(updates, [1, 1])
    cut = joint.to_lift(METHODS[name].rule(joint, lam=-2.0)).at(3, np.float64).dense()
    U, _, V = reference.dense_triplets(reference.dense_sum([u.dense() for u in updates], [1, 1]))
    s = np.linalg.svd(cut, compute_uv=False)
    np.testing.assert_allclose(s[:3], s[0], rtol=1e-12)
    if name == "iso-c":
        assert far(cut, -s[0] * U[:, :3] @ V[:, :3].T) < COMBINED_ITERATED
    else:
        assert np.sum((U[:, :3].T @ cut) ** 2) > 0.9 * np.sum(cut**2)


def test_cart_keeps_4_percent_of_the_shorter_side():
    for shape, rank in (((80, 30), 2), ((30, 80), 2), ((10, 9), 1)):
        updates = adapters(19, (4, 4, 4), shape)
        expected = reference.dense_cart([u.dense() for u in updates], [1, 1, 1], rank)
        assert far(result("cart", updates, [1, 1, 1]), expected) < COMBINED


def test_an_update_of_0_shortens_the_karcher_mean():
    update = adapters(20, (3,))[0]
    assert far(result("karcher", [update, None], [1, 3]), update.dense() / 4) < COMBINED


def test_ctm_has_the_rank_of_one_adapter():
    updates = adapters(13, (3, 4, 2))
    joint = Joint.of(updates, [1, 1, 1])
    assert joint.lift(METHODS["ctm"].rule(joint)).rank == 4
    assert joint.lift(METHODS["ctm"].rule(joint, rank=2)).rank == 2


def test_null_space_leaves_the_first_alone():
    updates = adapters(14, (3, 4))
    found = result("null-space", updates, [1, 1])
    V = np.linalg.svd(updates[0].dense())[2][:3].T
    np.testing.assert_allclose(found @ V, updates[0].dense() @ V, atol=1e-12)
    for mu, rank in ((0.0, 0), (0.5, 0), (3.0, 2)):
        expected = reference.dense_null_space([u.dense() for u in updates], [1, 1], mu, rank or None)
        assert far(result("null-space", updates, [1, 1], mu=mu, rank=rank), expected) < COMBINED


@pytest.mark.parametrize("weights", [[1, 3], [2, 1], [1, 1]])
def test_slerp_of_nearly_opposite_updates_is_the_straight_line(weights):
    """The angle is nearly π there, and its sine, by which the arc divides, nearly 0."""
    first, other = adapters(16, (3, 3))
    for beside in (0.0, 1e-3):
        near = LowRank(np.hstack([-3 * first.B, beside * other.B]), np.vstack([first.A, other.A]), first.scale)
        dense = [first.dense(), near.dense()]
        expected = reference.dense_sum(dense, np.divide(weights, sum(weights)))
        assert far(result("slerp", [first, near], weights), expected) < COMBINED


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("average", [1, -1], "add up to 0"),
        ("slerp", [1, -1], "weights"),
        ("slerp", [0, 0], "weights"),
        ("karcher", [1, -1], "weights of 0 or more"),
    ],
)
def test_weights_that_make_no_sense_are_refused(name, weights, message):
    with pytest.raises(OptionError, match=message):
        result(name, adapters(18, (3, 4)), weights)
