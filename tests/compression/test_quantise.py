"""Whole adapters in few bits: what was lost, and what comes back from the file."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.compression.loss import losses, total_error
from loralens.compression.quantise import quantise
from loralens.core.few_bits.quantised import NAME
from loralens.core.lazy import LazyArray
from loralens.core.scaling import Scaling
from loralens.core.structured import Dense, Structured
from loralens.errors import MismatchError, OptionError
from tests.tolerances import INT4, INT8

RNG = np.random.default_rng(5)


def adapter() -> loralens.Adapter:
    scaling = Scaling("alpha/r", 8, 4, "adapter_config.json")
    modules = {
        f"layers.{i}.{kind}": loralens.LowRank(
            RNG.standard_normal((out, 4)).astype(np.float32), RNG.standard_normal((4, 30)).astype(np.float16), -2.0,
            scaling=scaling,
        )
        for i in range(2)
        for kind, out in (("up", 70), ("down", 41))
    }  # fmt: skip
    return loralens.Adapter(modules=modules, base_model="tiny")


@pytest.mark.parametrize(("bits", "limit"), [(8, INT8), (4, INT4)])
def test_what_was_lost_is_what_the_factors_say(bits: int, limit: float) -> None:
    before = adapter()
    after = quantise(before, bits=bits)
    lost = losses(before, after)
    assert list(lost) == list(after) == list(before)
    for name, module in after.items():
        dense = np.linalg.norm(before[name].dense() - module.dense()) / np.linalg.norm(before[name].dense())
        assert lost[name].relative_error == pytest.approx(dense, rel=1e-9)
        assert (lost[name].rank_before, lost[name].rank_after) == (4, 4)
        assert dense <= limit
        assert (module.scale, module.scaling) == (-2.0, before[name].scaling)
        assert module.parameters == 4 * sum(module.shape)
        assert module.nbytes == sum(-(-side * bits // 8) for side in module.shape) * 4 + 36
    assert total_error(lost) <= limit


def test_bits_by_module_and_direction_are_the_rank() -> None:
    before = adapter()
    bits = {name: [8, 3] for name in before} | {"layers.1.up": [16]}
    after = quantise(before, bits=bits, threads=2)
    lost = losses(before, after, threads=2)
    assert [module.rank for module in after.modules.values()] == [2, 2, 2, 1]
    s = before["layers.1.up"].singular_values()
    assert lost["layers.1.up"].relative_error == pytest.approx(np.sqrt(1 - s[0] ** 2 / (s @ s)), rel=1e-6)


def test_the_whole_numbers_are_what_is_written(tmp_path: Path) -> None:
    after = quantise(adapter(), bits=4)
    loralens.save(after, tmp_path / "q", format=NAME)
    back = loralens.load(tmp_path / "q")
    for name, module in after.items():
        assert module.origin is not None
        assert back[name].origin is not None
        (here,), (there,) = module.origin.tensors.values(), back[name].origin.tensors.values()
        assert here.read().tobytes() == there.read().tobytes()
        np.testing.assert_array_equal(back[name].B, module.B)
        np.testing.assert_array_equal(back[name].A, module.A)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(OptionError, match="only one of the adapter and bits has"):
        quantise(adapter(), bits={"layers.0.up": [8]})
    with pytest.raises(OptionError, match=r"layers\.0\.down: 1 are not the bit widths"):
        quantise(adapter(), bits=1)
    for wrong in ([], [0], [8, 0, 8], [8] * 5, [8, 17]):
        with pytest.raises(OptionError, match="are not the bit widths of at most 4 directions"):
            quantise(adapter(), bits=dict.fromkeys(adapter(), wrong))
    full = Structured(Dense(LazyArray.of(np.eye(3))))
    with pytest.raises(MismatchError, match="is not a pair of factors"):
        quantise(loralens.Adapter(modules={"a": full}), bits=8)
