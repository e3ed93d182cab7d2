"""What training begins with: the law of the numbers, and that a seed means the same everywhere."""

import numpy as np
import pytest

from loralens.training.initialisation import draw_pair, factor_digest

torch = pytest.importorskip("torch")


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
