"""Rank and bits chosen together: beside rank alone, beside every other choice, and on real adapters."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loralens
from loralens.compression.bits import _hull, allocate_bits, expected_error, tradeoff
from loralens.compression.loss import losses, total_error
from loralens.compression.quantise import quantise
from loralens.core.few_bits.quantised import direction_bytes
from loralens.errors import OptionError
from loralens.formats.dialects.sizes import file_size
from loralens.linalg.few_bits.quantise import expected_noise
from tests.marks import examples
from tests.reference import truncation_bytes

LEVELS = (0, *range(2, 17))


@st.composite
def problems(draw, largest=4):
    """Spectra and shapes of a few modules."""
    spectra, shapes = {}, {}
    for i in range(draw(st.integers(1, largest))):
        k = draw(st.integers(1, 4))
        exponents = draw(st.lists(st.floats(-4, 1), min_size=k, max_size=k))
        spectra[f"m{i}"] = np.sort(10.0 ** np.array(exponents))[::-1]
        shapes[f"m{i}"] = draw(st.integers(8, 300)), draw(st.integers(8, 300))
    return spectra, shapes


def cost(shapes, bits):
    return sum(direction_bytes(shapes[name], b) for name, each in bits.items() for b in each)


def lost(spectra, bits):
    return expected_error(spectra, bits) ** 2 * sum(float(s @ s) for s in spectra.values())


@examples(100)
@given(problems(), st.floats(0.02, 1.2))
def test_within_budget_leading_directions_and_never_worse_than_rank_alone(problem, fraction: float) -> None:
    spectra, shapes = problem
    whole = sum(float(s @ s) for s in spectra.values())
    widest = sum(4 * sum(shapes[name]) * s.size for name, s in spectra.items())
    least = sum(direction_bytes(shape, 2) for shape in shapes.values())
    budget = max(int(fraction * widest), least)
    found = allocate_bits(spectra, shapes, budget)
    assert found.nbytes == cost(shapes, found.bits) <= budget
    assert found.error == expected_error(spectra, found.bits)
    for name, each in found.bits.items():
        assert 1 <= len(each) <= spectra[name].size
        assert list(each) == sorted(each, reverse=True)
        assert set(each) <= set(LEVELS[1:])
    alone = truncation_bytes(spectra, shapes, 4, budget)
    assert lost(spectra, found.bits) <= alone + expected_noise(16) * whole * (1 + 1e-9)


@examples(40)
@given(problems(largest=2), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_more_bytes_lose_no_more_by_more_than_a_step(problem, first: float, second: float) -> None:
    spectra, shapes = problem
    top = sum(direction_bytes(shapes[name], 16) * s.size for name, s in spectra.items())
    least = sum(direction_bytes(shape, 2) for shape in shapes.values())
    low, high = sorted(int(least + f * (top - least)) for f in (first, second))
    step = max(direction_bytes(shape, 4) for shape in shapes.values())
    few = allocate_bits(spectra, shapes, low)
    assert allocate_bits(spectra, shapes, max(high, low) + step).error <= few.error * (1 + 1e-9)
    assert allocate_bits(spectra, shapes, top).error <= expected_noise(16) ** 0.5 * (1 + 1e-9)


@pytest.mark.slow
def test_against_every_other_choice() -> None:
    """Two modules of two directions: at most one step behind the best of all 16⁴ choices, at every budget."""
    spectra, shapes = {"a": np.array([1.0, 0.3]), "b": np.array([0.5, 0.02])}, {"a": (40, 30), "b": (90, 20)}
    each = [(b, c) for b, c in itertools.product(LEVELS, LEVELS) if b and (not c or b >= c)]
    choices = [{"a": tuple(x for x in a if x), "b": tuple(x for x in b if x)} for a in each for b in each]
    costs = np.array([cost(shapes, choice) for choice in choices])
    energy = np.array([lost(spectra, choice) for choice in choices])
    step = direction_bytes((90, 20), 3)
    for budget in range(85, 900, 57):
        best = energy[costs <= budget].min()
        found = lost(spectra, allocate_bits(spectra, shapes, budget).bits)
        assert best <= found * (1 + 1e-12)
        assert found <= energy[costs <= max(budget - step, costs.min())].min() * (1 + 1e-12)


@pytest.mark.parametrize("floored", [False, True])
@pytest.mark.parametrize(
    "shapes",
    [[(1, 1)], [(3, 5)], [(8, 8)], [(64, 48)], [(4000, 7)], [(3, 5), (17, 2), (100, 1)], [*[(1, 1)] * 20, (8, 8)]],
)
def test_bits_worth_having_are_those_that_no_line_between_two_others_is_below(shapes, floored: bool) -> None:
    """Every point beside every pair of others."""
    points = [(sum(direction_bytes(shape, b) for shape in shapes), expected_noise(b), b) for b in LEVELS]
    points = [p for p in points if not any(q[0] == p[0] and q[1] < p[1] for q in points)]  # fewest, for their bytes
    start = points[1:] if floored else points  # a direction is kept in any case, and what follows begins there

    def above(p):
        pairs = itertools.product(start, start)
        return any(a[0] < p[0] < b[0] and p[1] >= np.interp(p[0], (a[0], b[0]), (a[1], b[1])) for a, b in pairs)

    expected = [p for p in points if p in points[: 1 + floored] or not above(p)]
    hull = _hull(shapes, floored=floored)
    assert hull.bits.tolist() == [b for _, _, b in expected]
    assert hull.costs.tolist() == [nbytes for nbytes, _, _ in expected]
    assert hull.noise.tolist() == [noise for _, noise, _ in expected]


def test_bits_grow_with_the_logarithm_of_sigma() -> None:
    spectra, shapes = {"a": 2.0 ** -np.arange(10.0)}, {"a": (4000, 4000)}
    (each,) = allocate_bits(spectra, shapes, 8000 * 30 // 8).bits.values()
    assert each[0] - each[3] in (3, 4)  # a step of 2 in σ is about a bit
    assert len(each) < 10
    assert each[-1] >= 2


def test_what_counts_is_the_gain_per_byte() -> None:
    shapes = {f"narrow{i}": (50, 50) for i in range(60)} | {"wide": (5000, 5000)}
    found = allocate_bits(dict.fromkeys(shapes, np.ones(1)), shapes, 8800).bits
    assert found["wide"] in ((2,), (3,))
    assert min(found[name][0] for name in shapes if name != "wide") >= 6


def test_weights_and_groups_and_modules_that_may_go() -> None:
    spectra = {"a": np.array([1.0, 0.5]), "b": np.array([1.0, 0.5]), "dead": np.zeros(2)}
    shapes = dict.fromkeys(spectra, (100, 100))
    even = allocate_bits(spectra, shapes, 400)
    assert even.bits["dead"] == (2,)
    weighed = allocate_bits(spectra, shapes, 400, weights={"a": 100.0})
    assert sum(weighed.bits["a"]) > sum(even.bits["a"])
    assert sum(weighed.bits["b"]) < sum(even.bits["b"])
    gone = allocate_bits(spectra, shapes, 400, least={"a": 1, "b": 1, "dead": 0})
    assert gone.bits["dead"] == ()
    assert gone.error <= even.error
    together = allocate_bits(spectra, shapes, 500, weights={"a": 100.0}, shared={"a": "x", "b": "x"})
    assert together.bits["a"] == together.bits["b"]


def test_a_budget_too_small_says_the_smallest_that_works() -> None:
    spectra, shapes = {"a": np.ones(2), "b": np.ones(1)}, {"a": (10, 30), "b": (8, 8)}
    with pytest.raises(OptionError, match="a budget of 20 bytes is too small") as error:
        allocate_bits(spectra, shapes, 20)
    needed = int(error.value.fix.split("give at least ")[1].split(":")[0].replace(",", ""))
    assert allocate_bits(spectra, shapes, needed).nbytes == needed
    assert all(len(each) == 1 for each in allocate_bits(spectra, shapes, needed).bits.values())
    with pytest.raises(OptionError):
        allocate_bits(spectra, shapes, needed - 1)


def test_the_curve_is_what_allocate_finds() -> None:
    spectra = {"a": np.array([3.0, 1.0, 0.1]), "b": np.array([2.0, 0.01])}
    shapes = {"a": (64, 32), "b": (16, 128)}
    curve = tradeoff(spectra, shapes)
    assert curve.nbytes.dtype == np.int64
    assert curve.nbytes.shape == curve.error.shape
    assert (np.diff(curve.nbytes) > 0).all()
    assert (np.diff(curve.error) < 0).all()
    for nbytes, error in list(zip(curve.nbytes.tolist(), curve.error, strict=True))[::3]:
        found = allocate_bits(spectra, shapes, nbytes)
        assert found.nbytes == nbytes
        assert found.error == pytest.approx(error, rel=1e-6, abs=1e-9)


def test_nothing_to_choose_from() -> None:
    assert allocate_bits({}, {}, 10).bits == {}
    dead = allocate_bits({"a": np.zeros(3)}, {"a": (4, 4)}, 100)
    assert dead.error == 0.0
    assert dead.bits["a"] == (dead.bits["a"][0],)
    assert tradeoff({"a": np.zeros(3)}, {"a": (4, 4)}).error.tolist() == [0.0]


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["minilm-souravt-ckpt750", "qwen05b-peft-r8", "sam-vitb-rank16"])
@pytest.mark.parametrize("part", [16, 8])
def test_real_files_keep_the_size_and_lose_less_than_rank_alone(real: Path, name: str, part: int, tmp_path) -> None:
    adapter = loralens.load(real / name)
    spectra = {module: one.singular_values() for module, one in adapter.items()}
    shapes = {module: one.shape for module, one in adapter.items()}
    budget = 4 * sum(sum(shapes[module]) * s.size for module, s in spectra.items()) // part
    found = allocate_bits(spectra, shapes, budget, size=lambda bits: file_size(adapter, "loralens-q", bits=bits))
    small = quantise(adapter, bits=found.bits)
    lost = losses(adapter, small)
    loralens.save(small, tmp_path / "small.safetensors", format="loralens-q")
    size = (tmp_path / "small.safetensors").stat().st_size
    largest = max(direction_bytes(shape, 4) for shape in shapes.values())
    assert budget - largest <= size == found.nbytes <= budget
    assert total_error(lost) == pytest.approx(found.error, rel=0.15)
    rest = np.sort(np.concatenate([s**2 for s in spectra.values()]))[::-1]
    narrow = 4 * min(map(sum, shapes.values()))
    alone = np.sqrt(rest[budget // narrow :].sum() / rest.sum())  # even if every module were the smallest
    assert total_error(lost) < 0.6 * alone


@pytest.mark.parametrize("unit", [1e-200, 1e200])
def test_bits_do_not_hang_on_the_unit(unit: float) -> None:
    spectra = {"a": np.array([8.0, 1.0, 0.1]), "b": np.array([2.0, 0.5])}
    far = {name: unit * s for name, s in spectra.items()}
    shapes = {"a": (40, 30), "b": (20, 20)}
    assert allocate_bits(far, shapes, 300) == allocate_bits(spectra, shapes, 300)
    np.testing.assert_array_equal(tradeoff(far, shapes).error, tradeoff(spectra, shapes).error)
