"""What training begins with: the law of the numbers, and that a seed means the same everywhere."""

import numpy as np
import pytest

from loralens.training.initialisation import combined_digest, draw_pair, factor_digest
from loralens.training.injection import inject
from tests.training.conftest import holder

torch = pytest.importorskip("torch")


def test_kaiming_uniform_is_that_of_torch_in_law() -> None:
    B, A = draw_pair("m", (10, 400), rank=64, seed=0)
    other = torch.empty(64, 400)
    torch.nn.init.kaiming_uniform_(other, a=5**0.5)
    assert not B.any()
    assert A.abs().max() <= 1 / 20
    assert A.abs().max() > 0.999 / 20
    for power in (1, 2, 4):
        moments = [(x.double() * 20).pow(power).mean().item() for x in (A, other)]
        np.testing.assert_allclose(moments[0], moments[1], atol=0.02)


def test_gaussian_has_the_width_of_pefts() -> None:
    _, A = draw_pair("m", (10, 4000), rank=16, seed=0, start="gaussian")
    np.testing.assert_allclose(A.std().item(), 1 / 16, rtol=0.02)


def test_embeddings_draw_b() -> None:
    B, A = draw_pair("m", (300, 50), rank=16, seed=0, embedding=True)
    assert not A.any()
    np.testing.assert_allclose([B.mean().item(), B.std().item()], [0, 1], atol=0.03)


def test_factors_depend_on_seed_name_and_rank_and_on_nothing_else() -> None:
    def first(**changes: object) -> str:
        name = changes.pop("name", "m")
        return factor_digest(draw_pair(name, (4, 6), **{"rank": 2, "seed": 0, **changes}).A)  # type: ignore[arg-type]

    assert first() == first()
    assert len({first(), first(seed=1), first(name="n"), first(rank=3)}) == 4
    small, large = (draw_pair("m", (40, 60), rank=rank, seed=0).A for rank in (2, 8))
    assert not torch.equal(large[:2], small)  # or the subspaces of two ranks would be nested from the start


def test_digests_are_of_numbers_not_of_dtypes() -> None:
    A = draw_pair("m", (4, 6), rank=2, seed=0).A
    assert factor_digest(A) == factor_digest(A.double()) != factor_digest(A.T) != factor_digest(-A)
    assert combined_digest({"b": "1", "a": "2"}) == combined_digest({"a": "2", "b": "1"}) != combined_digest({"a": "1"})


def test_a_model_begins_the_same_in_every_process_and_dtype() -> None:
    torch.manual_seed(99)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        made = inject(holder("linear", dtype=dtype), rank=2, seed=5)
        assert made.digests == {"net.layer": "f9dc3d15f1f1081c"}  # written down in another process


def test_injection_draws_nothing_from_torch() -> None:
    torch.manual_seed(4)
    state = torch.get_rng_state()
    inject(holder("linear"), rank=2, dropout=0.1)
    assert torch.equal(state, torch.get_rng_state())
