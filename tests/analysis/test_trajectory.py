"""A run through its checkpoints: what it says is what dense updates say."""

import numpy as np
import pytest

import loralens
from loralens.analysis import measure_trajectory
from tests.reference import effective_rank, whole_cosine
from tests.tolerances import COLLECTION, MEASURE

NAMES = ("layers.0.q", "layers.1.q")


def run(steps: tuple[float, ...] = (0.1, 0.5, 0.95, 1.0), seed: int = 0, turn: bool = False) -> list[loralens.Adapter]:
    """Checkpoints of one run: A near its start, B on its way from one matrix to another."""
    rng = np.random.default_rng(seed)
    start = {name: rng.standard_normal((2, 9)) for name in NAMES}
    far = {name: (rng.standard_normal((8, 2)), rng.standard_normal((8, 2))) for name in NAMES}
    return [
        loralens.Adapter(
            modules={
                name: loralens.LowRank(
                    far[name][0] * step + (far[name][1] * (1 - step) if turn else 0),
                    start[name] * (1 + 0.01 * step),
                    2.0,
                )
                for name in NAMES
            }
        )
        for step in steps
    ]


def dense(one: loralens.Adapter) -> list[np.ndarray]:
    return [one[name].dense() for name in NAMES]


def test_points_are_those_of_the_dense_updates() -> None:
    adapters = run(turn=True)
    found = measure_trajectory(adapters)
    for t, point in enumerate(found.points):
        own, last = dense(adapters[t]), dense(adapters[-1])
        spectra = [np.linalg.svd(D, compute_uv=False)[:2] for D in own]
        assert point.frobenius == pytest.approx(np.linalg.norm(np.concatenate(own)), rel=MEASURE)
        assert point.spectral == pytest.approx(max(s[0] for s in spectra))
        assert point.effective_rank == pytest.approx(np.mean([effective_rank(s) for s in spectra]))
        assert point.cosine == pytest.approx(whole_cosine(own, last), abs=COLLECTION)
        if t:
            before = dense(adapters[t - 1])
            assert point.length == pytest.approx(np.linalg.norm(np.concatenate(own) - np.concatenate(before)))
            assert point.previous_cosine == pytest.approx(whole_cosine(own, before), abs=COLLECTION)
    assert found.points[0].length is found.points[0].previous_cosine is found.points[0].previous_phi is None
    assert found.points[-1].phi == pytest.approx({"in": 1.0, "out": 1.0})
    assert found.points[0].phi["in"] == pytest.approx(1)
    assert found.points[0].phi["out"] < 0.99
    assert found.points[1].previous_phi == pytest.approx(measure_trajectory(adapters[:2]).points[0].phi)
    assert found.chance == {"in": pytest.approx(2 / 9), "out": pytest.approx(2 / 8)}


@pytest.mark.parametrize("size", [1e-9, 1e-13])
def test_a_tiny_step_is_measured_not_lost(size: float) -> None:
    one = run((1.0,))[0]
    two = one.map(lambda m: loralens.LowRank(m.B * (1 + size), m.A, m.scale))
    found = measure_trajectory([one, two])
    assert found.points[1].length == pytest.approx(size * found.points[0].frobenius, rel=1e-2)


def test_settled_is_the_first_from_which_all_have_the_direction() -> None:
    assert measure_trajectory(run()).settled == 0
    turning = measure_trajectory(run(turn=True))
    cosines = [point.cosine for point in turning.points]
    assert turning.settled == next(t for t in range(4) if min(cosines[t:]) >= 0.9)
    assert cosines[turning.settled - 1] < 0.9
    assert measure_trajectory(run((0.1, 0.2, 1.0), turn=True)).settled is None
    there_and_back = run((0.99, 0.2, 1.0), turn=True)
    found = measure_trajectory(there_and_back)
    assert found.points[0].cosine > 0.9 > found.points[1].cosine
    assert found.settled is None


def test_another_run_is_told_apart_and_nothing_is_settled() -> None:
    found = measure_trajectory([*run(), run((1.0,), seed=1)[0]])
    assert found.runs == ((0, 1, 2, 3), (4,))
    assert found.settled is None
    assert measure_trajectory(run()).runs == ((0, 1, 2, 3),)
    led = measure_trajectory([run((1.0,), seed=1)[0], *run((0.9, 1.0))])
    assert led.runs == ((0,), (1, 2))
    assert led.settled is None


def test_a_zero_checkpoint_has_no_direction() -> None:
    one, two = run((0.0, 1.0))
    found = measure_trajectory([one, two])
    assert found.points[0].frobenius == found.points[0].effective_rank == 0
    assert np.isnan(found.points[0].cosine)
    assert found.points[1].length == pytest.approx(found.points[1].frobenius)
    assert found.settled is None


def test_the_real_run(real: object) -> None:
    checkpoints = [loralens.load(real / f"minilm-souravt-ckpt{step}") for step in (100, 400, 750)]  # type: ignore[operator]
    found = measure_trajectory(checkpoints)
    assert found.runs == ((0, 1, 2),)
    assert found.settled == 1
    other = measure_trajectory([*checkpoints, loralens.load(real / "minilm-souravt-finetuned")])  # type: ignore[operator]
    assert other.runs == ((0, 1, 2), (3,))
    assert other.points[2].initial == pytest.approx(-0.0025, abs=5e-5)
