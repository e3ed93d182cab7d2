"""The first pair of PiSSA on matrices that are too big for a dense SVD at every start."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loralens.training import initialisation as leading
from loralens.training.initialisation import principal_pair

torch = pytest.importorskip("torch")

SHAPES = [(700, 600), (600, 900)]
RANK, SCALE = 8, 2.0


def spectrum(kind: str, count: int) -> Any:
    """Values that fall as those of real weights do, or hardly at all."""
    return {"falling": 30.0 / np.arange(1, count + 1) ** 0.5, "flat": np.linspace(1.02, 1.0, count)}[kind]


def weight(shape: tuple[int, int], kind: str) -> tuple[Any, Any, Any, Any]:
    rng = np.random.default_rng(0)
    count = min(shape)
    U, V = (np.linalg.qr(rng.standard_normal((side, count)))[0] for side in shape)
    s = spectrum(kind, count)
    return (U * s) @ V.T, U, s, V


@pytest.fixture
def never_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a dense SVD of a big matrix")

    monkeypatch.setattr(torch.linalg, "svd", refuse)


@pytest.mark.some(1)
@pytest.mark.usefixtures("never_dense")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_pair_of_a_big_matrix_is_its_best_approximation(shape: tuple[int, int], dtype: Any) -> None:
    W, U, s, V = weight(shape, "falling")
    B, A = (factor.double().numpy() for factor in principal_pair(torch.tensor(W).to(dtype), rank=RANK, scale=SCALE))
    best = (U[:, :RANK] * s[:RANK]) @ V[:, :RANK].T
    assert np.linalg.norm(SCALE * B @ A - best) < 0.02 * np.linalg.norm(best)
    np.testing.assert_allclose(np.linalg.norm(B, axis=0), np.linalg.norm(A, axis=1), rtol=1e-4)
    np.testing.assert_allclose(SCALE * np.linalg.norm(A, axis=1) ** 2, s[:RANK], rtol=5e-3)
    assert (A.max(axis=1) == np.abs(A).max(axis=1)).all()


@pytest.mark.usefixtures("never_dense")
def test_where_directions_are_crowded_the_pair_takes_as_much_of_the_weight() -> None:
    """Single directions are not determined there; what is left is hardly more than after the best approximation."""
    W, _, s, _ = weight(SHAPES[0], "flat")
    B, A = (factor.double().numpy() for factor in principal_pair(torch.tensor(W).float(), rank=RANK, scale=SCALE))
    left, least = np.linalg.norm(W - SCALE * B @ A), np.sqrt((s[RANK:] ** 2).sum())
    assert least <= left < least * (1 + 1e-3)


def test_the_same_weight_has_the_same_pair_to_the_bit() -> None:
    W = torch.tensor(weight(SHAPES[0], "falling")[0]).float()
    one = principal_pair(W, rank=RANK, scale=SCALE)
    leading._known.clear()
    two = principal_pair(W, rank=RANK, scale=SCALE)
    for mine, other in zip(one, two, strict=True):
        assert mine.dtype == torch.float32
        assert mine.is_contiguous()
        assert torch.equal(mine, other)


def test_directions_are_computed_once_in_a_process_and_the_oldest_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    W, other = (torch.tensor(weight(shape, "falling")[0]).float() for shape in SHAPES)
    calls: list[int] = []
    compute = leading.leading_svd

    def counted(matrix: Any, rank: int, **options: Any) -> Any:
        calls.append(rank)
        return compute(matrix, rank, **options)

    monkeypatch.setattr(leading, "leading_svd", counted)
    monkeypatch.setattr(leading, "_known", {})
    first = principal_pair(W, rank=RANK, scale=SCALE)
    again = principal_pair(W.clone(), rank=RANK, scale=3 * SCALE)  # the scale is no part of the directions
    assert calls == [RANK]
    torch.testing.assert_close(again.B * 3**0.5, first.B)
    first.B.zero_()  # what is kept is not what was given
    torch.testing.assert_close(principal_pair(W, rank=RANK, scale=3 * SCALE).B, again.B, rtol=0, atol=0)
    principal_pair(W, rank=RANK - 1, scale=SCALE)
    assert calls == [RANK, RANK - 1]
    monkeypatch.setattr(leading, "KEPT", 1)
    principal_pair(other, rank=RANK, scale=SCALE)
    principal_pair(W, rank=RANK, scale=SCALE)
    assert calls == [RANK, RANK - 1, RANK, RANK]


def test_a_weight_of_float64_has_the_exact_pair() -> None:
    W, U, s, V = weight(SHAPES[0], "falling")
    B, A = principal_pair(torch.tensor(W), rank=RANK, scale=SCALE)
    best = (U[:, :RANK] * s[:RANK]) @ V[:, :RANK].T
    np.testing.assert_allclose(SCALE * (B @ A).numpy(), best, rtol=0, atol=1e-11)


class Shelf:
    """A store in memory that counts."""

    def __init__(self) -> None:
        self.kept: dict[str, leading.TruncatedSvd] = {}
        self.found = 0

    def read(self, key: str, shape: tuple[int, int], rank: int) -> leading.TruncatedSvd | None:
        self.found += key in self.kept
        return self.kept.get(key)

    def write(self, key: str, directions: leading.TruncatedSvd) -> None:
        self.kept[key] = directions


@pytest.mark.slow
@pytest.mark.parametrize("rank", [RANK, 200])  # the randomised SVD, and the dense one
def test_directions_are_looked_up_in_a_store_and_kept_there(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    W, shelf = torch.tensor(weight(SHAPES[0], "falling")[0]).float(), Shelf()
    monkeypatch.setattr(leading, "_known", {})
    alone = principal_pair(W, rank=rank, scale=SCALE)
    for found in (0, 1):
        leading._known.clear()
        with leading.keeping_directions(shelf):
            pair = principal_pair(W, rank=rank, scale=SCALE)
        assert (len(shelf.kept), shelf.found) == (1, found)
        assert torch.equal(pair.A, alone.A)
        assert torch.equal(pair.B, alone.B)
    leading._known.clear()
    principal_pair(W, rank=rank, scale=SCALE)  # without the context nothing is looked up
    assert shelf.found == 1


@pytest.mark.some(1)
@pytest.mark.parametrize("rank", [RANK, 200])
def test_the_cache_folder_keeps_directions_bit_for_bit(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loralens.verbs.runs.train_adapter import DirectionCache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(leading, "_known", {})
    W = torch.tensor(weight(SHAPES[1], "falling")[0]).float()
    with leading.keeping_directions(DirectionCache()):
        first = principal_pair(W, rank=rank, scale=SCALE)
    (file,) = (tmp_path / "loralens").glob("*.safetensors")
    leading._known.clear()
    monkeypatch.setattr(leading, "_compute", None)  # nothing is computed again
    with leading.keeping_directions(DirectionCache()):
        again = principal_pair(W, rank=rank, scale=SCALE)
    assert torch.equal(first.A, again.A)
    assert torch.equal(first.B, again.B)
    leading._known.clear()
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with leading.keeping_directions(DirectionCache()), pytest.raises(TypeError):  # a damaged file is not believed
        principal_pair(W, rank=rank, scale=SCALE)
