"""Whole numbers for α in what `compress` and `scale` write, where B can hold the rest: some programs read one."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank
from loralens.core import Scaling

DTYPES = ["float32", "float16", ml_dtypes.bfloat16]


def stored(folder: Path, alpha: float = 16, *, dtype: Any = "float32", rslora: bool = False) -> Path:
    """A folder of PEFT with two modules of ranks 12 and 8, whose directions become weaker."""
    rng, modules = np.random.default_rng(0), {}
    for name, rank in (("a.q_proj", 12), ("a.v_proj", 8)):
        B, A = rng.standard_normal((20, rank)) * 0.7 ** np.arange(rank), rng.standard_normal((rank, 16))
        scaling = Scaling("alpha/sqrt(r)" if rslora else "alpha/r", alpha, rank)
        modules[name] = LowRank(B.astype(dtype), A.astype(dtype), scaling.value, scaling=scaling)
    loralens.save(Adapter(modules=modules), folder)
    return folder


def alphas(folder: Path) -> list[float]:
    config = json.loads((folder / "adapter_config.json").read_text())
    return [config["lora_alpha"], *config["alpha_pattern"].values()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rule", [{"rank": 7}, {"energy": 0.9}, {"rank": 5, "uniform": True}])
def test_truncation_chooses_a_whole_alpha_and_loses_nothing_by_it(
    rule: dict[str, Any], rslora: bool, dtype: Any, tmp_path: Path
) -> None:
    source = stored(tmp_path / "in", 17, dtype=dtype, rslora=rslora)
    loralens.compress(source, **rule, force=True, output=tmp_path / "out")
    before, after = loralens.load(source), loralens.load(tmp_path / "out")
    # In JSON 10.0 is no whole number for programs that read one.
    assert all(type(alpha) is int for alpha in alphas(tmp_path / "out"))
    rounding = {4: 1e-6, 2: 1e-2}[np.dtype(dtype).itemsize]
    for name, module in after.items():
        U, s, Vh = before[name].svd()
        best = (U[:, : module.rank] * s[: module.rank]) @ Vh[: module.rank]
        np.testing.assert_allclose(module.dense(), best, atol=rounding * s[0])


def test_modules_of_one_rank_keep_one_alpha(tmp_path: Path) -> None:
    source = stored(tmp_path / "in", 17)
    loralens.compress(source, rank=8, output=tmp_path / "out")
    after = loralens.load(tmp_path / "out")
    # Of rank 8 the first has α = 17·8/12, and the second 17, as it was read.
    assert [module.scaling.alpha for module in after.values()] == [11, 17]
    first, second = (module.without_origin() for module in loralens.load(source).values())
    both = Adapter(modules={"a.q_proj": first, "a.v_proj": second.rescaled(17 / 12, Scaling())})
    loralens.compress(both, rank=8, output=tmp_path / "joined")
    assert alphas(tmp_path / "joined") == [pytest.approx(17 * 8 / 12)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_moves_a_power_of_two_into_B(dtype: Any, tmp_path: Path) -> None:
    source = stored(tmp_path / "in", dtype=dtype)
    loralens.scale(source, 0.65625, output=tmp_path / "out")
    before, after = loralens.load(source), loralens.load(tmp_path / "out")
    assert alphas(tmp_path / "out") == [21]
    for name, module in before.items():
        np.testing.assert_array_equal(after[name].B * 2, module.B)
        np.testing.assert_allclose(after[name].dense(), 0.65625 * module.dense(), rtol=1e-15)


def test_an_alpha_that_no_power_of_two_makes_whole_is_left(tmp_path: Path) -> None:
    source = stored(tmp_path / "in")
    loralens.scale(source, 0.7, output=tmp_path / "out")
    before, after = loralens.load(source), loralens.load(tmp_path / "out")
    assert alphas(tmp_path / "out") == [pytest.approx(11.2)]
    assert all(np.array_equal(after[name].B, before[name].B) for name in before)


def test_small_numbers_of_float16_keep_their_bits(tmp_path: Path) -> None:
    tiny = {name: np.full((4, 2), 6e-8, np.float16) for name in ("a.q_proj", "a.v_proj")}
    modules = {n: LowRank(B, np.ones((2, 3), np.float16), 0.75, scaling=Scaling()) for n, B in tiny.items()}
    loralens.save(Adapter(modules=modules), tmp_path / "in")
    assert alphas(tmp_path / "in") == [1.5]
    assert np.array_equal(loralens.load(tmp_path / "in")["a.q_proj"].B, tiny["a.q_proj"])


def test_what_is_only_copied_keeps_its_bytes(tmp_path: Path) -> None:
    source = stored(tmp_path / "in", 10.5)
    assert alphas(source) == [10.5]
    loralens.convert(source, to="peft", output=tmp_path / "out")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (source / file).read_bytes()


def test_a_quotient_that_rounding_moved_is_whole_again(tmp_path: Path) -> None:
    # 29/7·7 is 29.000000000000004.
    module = LowRank(np.ones((9, 7)), np.ones((7, 8)), 29 / 7)
    loralens.save(Adapter(modules={"a.q_proj": module}), tmp_path / "out")
    assert alphas(tmp_path / "out") == [29]
