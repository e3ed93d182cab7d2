"""One line an adapter, and which adapters are the same."""

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.analysis.survey import SAME, Duplicate, duplicates, summarise_adapter
from tests.conftest import small_adapter
from tests.reference import effective_rank


def adapter(seed: int = 0, **options: object) -> loralens.Adapter:
    rng = np.random.default_rng(seed)
    return loralens.Adapter(
        modules={
            f"layers.{i}.q": loralens.LowRank(rng.standard_normal((9, 2)), rng.standard_normal((2, 7)), 0.5)
            for i in range(3)
        },
        **options,  # type: ignore[arg-type]
    )


def found(*adapters: loralens.Adapter) -> list[Duplicate]:
    return duplicates(adapters, [summarise_adapter(one) for one in adapters])


def test_a_summary_has_the_numbers_of_the_dense_update() -> None:
    one = small_adapter()
    seen = summarise_adapter(one)
    dense = [module.dense() for module in one.modules.values()]
    spectra = [np.linalg.svd(D, compute_uv=False)[:2] for D in dense if D.any()]
    assert (seen.modules, seen.zero, seen.ranks, seen.scales) == (6, 1, (2,), (4.0,))
    assert seen.parameters == 6 * 20
    assert seen.frobenius == pytest.approx(np.linalg.norm(np.concatenate(dense)))
    assert seen.effective_rank == pytest.approx(np.mean([effective_rank(s) for s in spectra]))
    assert len(seen.fingerprint) == 32


def test_the_same_tensors_are_copies_of_the_first() -> None:
    one = adapter()
    renamed = one.renamed({name: "lora_unet_" + name.replace(".", "_") for name in one})
    assert found(adapter(1), one, adapter(2), renamed, one) == [Duplicate(3, 1, "tensors"), Duplicate(4, 1, "tensors")]


def test_the_same_update_in_another_gauge_dtype_or_rank() -> None:
    rng = np.random.default_rng(5)

    def turned(m: loralens.LowRank) -> loralens.LowRank:
        G = rng.standard_normal((2, 2)) + 3 * np.eye(2)
        return loralens.LowRank(m.B @ G, np.linalg.solve(G, m.A), m.scale)

    def narrow(m: loralens.LowRank) -> loralens.LowRank:
        return loralens.LowRank(m.B.astype(ml_dtypes.bfloat16), m.A.astype(ml_dtypes.bfloat16), m.scale)

    def padded(m: loralens.LowRank) -> loralens.LowRank:
        return loralens.LowRank(np.hstack([m.B, 0 * m.B]), np.vstack([m.A, m.A]), m.scale)

    one = adapter()
    copies = found(one, one.map(turned), adapter(1), one.map(narrow), one.map(padded))  # type: ignore[arg-type]
    assert [(copy.index, copy.original, copy.kind) for copy in copies] == [
        (1, 0, "update"),
        (3, 0, "update"),
        (4, 0, "update"),
    ]
    assert copies[0].difference < 1e-14
    assert 1e-4 < copies[1].difference < SAME


@pytest.mark.parametrize(("off", "same"), [(0.9 * SAME, True), (1.1 * SAME, False)])
def test_near_is_not_the_same(off: float, same: bool) -> None:
    one = adapter()
    other = one.map(lambda m: loralens.LowRank(m.B, m.A, m.scale * (1 - off)))
    assert bool(found(one, other)) == same


def test_equal_norms_are_compared_module_by_module() -> None:
    one = adapter()
    flipped = one.map(lambda m: loralens.LowRank(-m.B, m.A, m.scale))
    elsewhere = one.renamed({name: f"other.{name}" for name in one})
    assert found(one, flipped, elsewhere) == []


def test_a_copy_of_a_copy_names_the_first() -> None:
    one = adapter()
    near = one.map(lambda m: loralens.LowRank(m.B, m.A, m.scale * (1 + 1e-4)))
    assert [(copy.index, copy.original, copy.kind) for copy in found(one, near, near)] == [
        (1, 0, "update"), (2, 0, "update"),
    ]  # fmt: skip
    assert found(one, near, near)[1].difference == found(one, near)[0].difference > 0


def test_small_steps_do_not_add_up() -> None:
    one = adapter()
    steps = [one.map(lambda m, k=k: loralens.LowRank(m.B, m.A, m.scale * (1 + 0.7 * k * SAME))) for k in range(4)]
    assert [(copy.index, copy.original) for copy in found(*steps)] == [(1, 0), (3, 2)]


def test_adapters_that_are_zero_are_no_copies_unless_their_factors_are() -> None:
    one = adapter().map(lambda m: loralens.LowRank(0 * m.B, m.A))
    two = adapter(1).map(lambda m: loralens.LowRank(0 * m.B, m.A))
    assert found(one, two) == []
    assert found(one, two, one) == [Duplicate(2, 0, "tensors")]


def test_shapes_are_compared_before_numbers_are_read() -> None:
    one = adapter()
    short = loralens.Adapter(
        modules={name: one[name] for name in list(one)[:2]}
        | {"dead": loralens.LowRank(np.zeros((1, 1)), np.zeros((1, 1)))}
    )
    assert found(one, short) == []
