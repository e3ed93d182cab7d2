"""Joint coding of a group: the error of each adapter, measured on dense matrices, and when sharing bases pays."""

import numpy as np
import pytest

from loralens.compression.joint.alone import code_alone, estimate_alone
from loralens.compression.joint.group import code_jointly
from loralens.compression.joint.split import SplitUpdate
from loralens.core.few_bits.quantised import direction_bytes
from loralens.core.lowrank import LowRank

SHAPES = ((48, 64), (96, 40))


def run(n, *, rank=4, space=6, noise=0.0, seed=0, scales=None):
    """n adapters whose modules lie in common spaces up to noise, as dense matrices' factors (B, A)."""
    rng = np.random.default_rng(seed)
    spaces = [(rng.standard_normal((out, space)), rng.standard_normal((in_, space))) for out, in_ in SHAPES]
    return [
        [
            (
                (scales[i] if scales else 1.0)
                * (U @ rng.standard_normal((space, rank)) + noise * rng.standard_normal((len(U), rank))),
                (V @ rng.standard_normal((space, rank)) + noise * rng.standard_normal((len(V), rank))).T,
            )
            for U, V in spaces
        ]
        for i in range(n)
    ]


def split(factors):
    return [[SplitUpdate.of(LowRank(B, A)) for B, A in adapter] for adapter in factors]


def alone_bytes(updates, error):
    return [estimate_alone(dict(zip("ab", adapter, strict=True)), error=error) for adapter in updates]


def dense_error(coding, factors, i):
    """‖ΔW − U C Vᵀ‖/‖ΔW‖ of member i, with dense matrices."""
    lost = total = 0.0
    entries = coding.integers[i] * np.float64(coding.steps[i])
    start = 0
    for module, (B, A) in zip(coding.bases, factors[coding.members[i]], strict=True):
        p, q = len(module.out.bits), len(module.in_.bits)
        C = entries[start : start + p * q].reshape(p, q)
        start += p * q
        W = B @ A
        lost += np.sum((W - module.out.values.astype(float) @ C @ module.in_.values.astype(float).T) ** 2)
        total += np.sum(W**2)
    return np.sqrt(lost / total)


@pytest.mark.parametrize("error", [0.3, 0.15, 0.05])
def test_every_member_keeps_the_error(error):
    factors = run(8, noise=0.01, scales=[10.0**k for k in range(-3, 5)])
    updates = split(factors)
    coding = code_jointly(updates, alone_bytes(updates, error), error=error)
    assert len(coding.members) == 8
    for i in range(8):
        measured = dense_error(coding, factors, i)
        assert measured <= error
        assert measured == pytest.approx(coding.errors[i], rel=1e-4)
    # The error is used: bytes that make it much smaller would be wasted.
    assert coding.errors.max() > 0.8 * error


def test_a_common_space_takes_fewer_bytes_than_each_alone():
    updates = split(run(12))
    alone = alone_bytes(updates, 0.15)
    coding = code_jointly(updates, alone, error=0.15)
    assert coding.shared_bytes + 12 * coding.core_bytes < 0.5 * sum(alone)


def test_unrelated_adapters_are_better_alone():
    updates = split([run(1, seed=seed)[0] for seed in range(6)])
    assert code_jointly(updates, alone_bytes(updates, 0.15), error=0.15) is None


def test_a_stranger_is_left_out_of_the_group():
    factors = [*run(7), *run(1, seed=99)]
    updates = split(factors)
    coding = code_jointly(updates, alone_bytes(updates, 0.15), error=0.15)
    assert coding.members.tolist() == list(range(7))


def test_an_adapter_whose_core_is_larger_than_it_is_alone_stays_alone():
    updates = split(run(7))
    alone = alone_bytes(updates, 0.15)
    alone[3] = 20
    coding = code_jointly(updates, alone, error=0.15)
    assert coding.core_bytes > 20
    assert 3 not in coding.members
    assert len(coding.members) == 6


def test_another_gauge_and_an_equal_scale_give_the_same_group():
    rng = np.random.default_rng(5)
    factors = run(5, noise=0.02)
    turned = []
    for adapter in factors:
        R = [rng.standard_normal((4, 4)) + 3 * np.eye(4) for _ in adapter]
        turned.append([(B @ X, np.linalg.inv(X) @ A) for (B, A), X in zip(adapter, R, strict=True)])
    first, second = (code_jointly(u, alone_bytes(u, 0.15), error=0.15) for u in (split(factors), split(turned)))
    assert first.shared_bytes + 5 * first.core_bytes == second.shared_bytes + 5 * second.core_bytes
    assert np.allclose(first.errors, second.errors, atol=1e-4)


def test_a_strong_adapter_does_not_change_the_bases_of_the_others():
    factors = run(6, noise=0.02)
    strong = [[(1e4 * B, A) for B, A in adapter] if i == 2 else adapter for i, adapter in enumerate(factors)]
    first, second = (code_jointly(u, alone_bytes(u, 0.15), error=0.15) for u in (split(factors), split(strong)))
    assert np.allclose(first.errors, second.errors, atol=1e-4)


@pytest.mark.parametrize("scale", [1e50, 1e-48])
def test_adapters_whose_steps_float32_cannot_hold_are_left_out(scale):
    factors = run(10, scales=[scale, 1.0, 1.0, scale, *[1.0] * 6])
    updates = split(factors)
    coding = code_jointly(updates, alone_bytes(updates, 0.15), error=0.15)
    assert list(coding.members) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert max(dense_error(coding, factors, i) for i in range(8)) <= 0.15
    # If that is so for all of them, there is no group.
    assert code_jointly(updates[:1] + updates[3:4], [10**9] * 2, error=0.15) is None


def test_one_module_may_be_zero():
    factors = run(4)
    for adapter in factors:
        adapter[1] = (0 * adapter[1][0], adapter[1][1])
    updates = split(factors)
    coding = code_jointly(updates, alone_bytes(updates, 0.15), error=0.15)
    assert [len(module.out.bits) > 0 for module in coding.bases] == [True, False]
    assert all(dense_error(coding, factors, i) <= 0.15 for i in range(len(coding.members)))


@pytest.mark.parametrize("error", [0.5, 0.15, 0.02, 0.001])
def test_alone_keeps_the_error_in_few_bytes(error):
    ((pair_a, pair_b),) = run(1, rank=8, space=8, seed=3)
    updates = {"a": SplitUpdate.of(LowRank(*pair_a)), "b": SplitUpdate.of(LowRank(*pair_b, 3.0))}
    coding = code_alone(updates, error=error)
    dense = {"a": pair_a[0] @ pair_a[1], "b": 3 * pair_b[0] @ pair_b[1]}
    lost = sum(
        np.sum((dense[name] - product.B.astype(float) @ product.A.astype(float)) ** 2)
        for name, product in coding.products.items()
    )
    measured = np.sqrt(lost / sum(np.sum(W**2) for W in dense.values()))
    assert measured <= error
    assert measured == pytest.approx(coding.error, rel=1e-3)
    assert coding.nbytes == sum(
        direction_bytes(dense[name].shape, int(b)) for name, product in coding.products.items() for b in product.bits
    )
    assert abs(coding.nbytes / estimate_alone(updates, error=error) - 1) < 0.2


def test_alone_of_an_error_below_16_bits_has_16_bits():
    ((pair, _),) = run(1, seed=4)
    coding = code_alone({"a": SplitUpdate.of(LowRank(*pair))}, error=1e-9)
    assert set(coding.products["a"].bits.tolist()) == {16}


def test_the_distance_of_a_split_update_is_that_of_dense_matrices():
    rng = np.random.default_rng(6)
    B, A, B2, A2 = (rng.standard_normal(shape) for shape in ((9, 3), (3, 7), (9, 2), (2, 7)))
    update = SplitUpdate.of(LowRank(B, A, -2.0))
    assert update.energy == pytest.approx(np.sum((2 * B @ A) ** 2))
    assert update.squared_distance(B2, A2) == pytest.approx(np.sum((-2 * B @ A - B2 @ A2) ** 2))
    assert update.shape == (9, 7)
    assert np.allclose(update.left @ update.right.T, -2 * B @ A)
