"""Families and runs against a truth."""

from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.errors import OptionError
from loralens.fleet import groups as grouping
from loralens.fleet.groups import alike_groups, connected_rows, cosines_among
from loralens.fleet.sketches import Sketches
from loralens.verbs.fleets.fleet_verbs import Fleet
from loralens.verbs.fleets.group_answers import FamiliesResult
from tests.fleet.synthetic import Entry, adapter_of, adjusted_rand, dense_cosine, make_fleet, random_factors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fleet, list[Entry]]:
    folder = tmp_path_factory.mktemp("fleet")
    truth = make_fleet(folder)
    fleet = Fleet.open(folder)
    fleet.update(folder)
    return fleet, truth


def labels(groups: object, names: list[str]) -> list[int]:
    number = {member.name: i for i, group in enumerate(groups) for member in group.members}  # type: ignore[call-overload]
    return [number.get(name, -i - 1) for i, name in enumerate(names)]


def test_families_are_those_of_the_truth(made: tuple[Fleet, list[Entry]]) -> None:
    fleet, truth = made
    result = fleet.families()
    names = [entry.name for entry in truth]
    assert adjusted_rand(labels(result, names), [entry.family for entry in truth]) == 1.0
    assert not result.alone
    assert result.conclusion()[0].startswith("27 adapters: 3 families of adapters that are alike")


def test_runs_are_those_of_the_truth_in_order_of_steps(made: tuple[Fleet, list[Entry]]) -> None:
    fleet, truth = made
    result = fleet.runs()
    assert adjusted_rand(labels(result, [entry.name for entry in truth]), [entry.run for entry in truth]) == 1.0
    assert all(run.steps == [100, 200, 300] for run in result)


def test_a_copy_with_other_factors_belongs_to_the_run_of_its_original(tmp_path: Path) -> None:
    make_fleet(tmp_path, families=1, runs=2)
    adapter = loralens.load(tmp_path / "f0-r0" / "checkpoint-300")
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
    turned = adapter.map(lambda m: loralens.LowRank(m.B @ turn, turn.T @ m.A, m.scale))
    loralens.save(turned, tmp_path / "turned")
    fleet = Fleet.open(tmp_path)
    fleet.update(tmp_path)
    groups = [{member.name for member in run.members} for run in fleet.runs()]
    assert sorted(map(len, groups)) == [3, 4]
    assert {"turned", "f0-r0/checkpoint-100"} <= max(groups, key=len)


def test_cosines_of_groups_are_exact(made: tuple[Fleet, list[Entry]]) -> None:
    fleet, _ = made
    for family in fleet.families():
        ends = [fleet.adapter(family.members[i]) for i in (0, -1)]
        assert family.exact
        assert family.middle_to_furthest == pytest.approx(dense_cosine(*ends)[0], abs=1e-6)
        others = [dense_cosine(ends[0], fleet.adapter(member))[0] for member in family.members]
        # The last one is furthest by sketches, whose error is a few hundredths.
        assert family.middle_to_furthest <= min(others) + 0.05
    for run in fleet.runs():
        assert run.cosine == pytest.approx(dense_cosine(*(fleet.adapter(run.members[i]) for i in (0, -1)))[0], abs=1e-6)


def test_sketches_alone_read_no_file(made: tuple[Fleet, list[Entry]], tmp_path: Path) -> None:
    fleet, truth = made
    copied = Fleet.open(tmp_path / "index")
    folder = tmp_path / "adapters"
    make_fleet(folder)
    copied.update(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    sketched = copied.families(sketch=True)
    assert not any(family.exact for family in sketched)
    assert labels(sketched, [entry.name for entry in truth]) == labels(fleet.families(), [e.name for e in truth])
    assert all(run.cosine is not None and not run.exact for run in copied.runs(sketch=True))


def test_near_the_level_the_exact_mean_cosine_decides(tmp_path: Path) -> None:
    """Pairs with a cosine of 0.49 ± 0.02, some of which sketches take to the other side of 0.5."""
    rng = np.random.default_rng(0)
    for pair in range(16):
        own, other = random_factors(rng), random_factors(rng)
        mixed = {
            key: (np.hstack([0.49 * B, np.sqrt(1 - 0.49**2) * other[key][0]]), np.vstack([A, other[key][1]]))
            for key, (B, A) in own.items()
        }
        loralens.save(adapter_of(own), tmp_path / f"{pair}-a")
        loralens.save(adapter_of(mixed), tmp_path / f"{pair}-b")
    fleet = Fleet.open(tmp_path)
    fleet.update(tmp_path)

    def cosines(families: FamiliesResult) -> list[float]:
        return [dense_cosine(*map(fleet.adapter, family.members))[0] for family in families]

    assert min(cosines(fleet.families())) >= 0.5
    sketched = fleet.families(sketch=True)
    assert min(cosines(sketched)) < 0.5
    assert "(mean cosine by sketches at least 0.5)" in sketched.conclusion()[0]


@pytest.mark.parametrize("at", [0.0, 0.05, 1.5])
def test_a_level_out_of_range_is_refused(made: tuple[Fleet, list[Entry]], at: float) -> None:
    with pytest.raises(OptionError, match=r"between 0\.1 and 1"):
        made[0].families(at)


def random_sketches(groups: int, each: int, noise: float) -> Sketches:
    rng = np.random.default_rng(1)
    rows = np.repeat(rng.standard_normal((groups, 4096)), each, axis=0)
    rows += noise * rng.standard_normal(rows.shape)
    steps = np.abs(rows).max(axis=1) / 127
    codes = np.round(rows / steps[:, None]).astype(np.int8)
    return Sketches(codes, steps, np.zeros((len(rows), 256), np.int8))


def test_blocks_do_not_change_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    sketches = random_sketches(7, 9, 0.6)
    whole = [group.tolist() for group in alike_groups(sketches, 0.5)]
    assert whole == [list(range(9 * i, 9 * i + 9)) for i in range(7)]
    monkeypatch.setattr(grouping, "BLOCK", 10)
    assert [group.tolist() for group in alike_groups(sketches, 0.5)] == whole
    expected = sketches.directions() @ sketches.directions().T
    np.testing.assert_allclose(cosines_among(sketches, np.arange(63)), expected, atol=1e-5)


def test_a_component_too_large_for_one_matrix_has_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # All rows share a direction, so that all are in one component at 0.35, and the groups have their own at 0.6.
    rng = np.random.default_rng(2)
    rows = 0.62 * rng.standard_normal(4096) + np.repeat(rng.standard_normal((6, 4096)), 12, axis=0) * 0.7
    rows += 0.1 * rng.standard_normal(rows.shape)
    steps = np.abs(rows).max(axis=1) / 127
    sketches = Sketches(np.round(rows / steps[:, None]).astype(np.int8), steps, np.zeros((72, 256), np.int8))
    assert len(connected_rows(lambda part: sketches.directions(rows=part), 72, 0.35)) == 1
    whole = [group.tolist() for group in alike_groups(sketches, 0.6)]
    assert len(whole) == 6
    monkeypatch.setattr(grouping, "LARGEST", 20)
    monkeypatch.setattr(grouping, "MARGIN", 0.3)
    # The matrix of all of them would be too large.
    monkeypatch.setattr(grouping, "cosines_among", None)
    assert [group.tolist() for group in alike_groups(sketches, 0.6)] == whole


def test_adapters_that_were_joined_beforehand_count_each(monkeypatch: pytest.MonkeyPatch) -> None:
    # The cosine of c with a is 0.1 and with b 0.677. Its mean with a, a, a and b is 0.244, and 0.389 if a counts once.
    x, y = np.linalg.qr(np.random.default_rng(3).standard_normal((4096, 2)))[0].T
    rows = np.array([x, x, x, 0.8 * x + 0.6 * y, 0.1 * x + np.sqrt(0.99) * y])
    steps = np.abs(rows).max(axis=1) / 127
    sketches = Sketches(np.round(rows / steps[:, None]).astype(np.int8), steps, np.zeros((5, 256), np.int8))
    whole = [group.tolist() for group in alike_groups(sketches, 0.3)]
    assert whole == [[0, 1, 2, 3]]
    monkeypatch.setattr(grouping, "LARGEST", 3)
    assert [group.tolist() for group in alike_groups(sketches, 0.3)] == whole


def test_an_adapter_that_is_0_is_in_no_group(tmp_path: Path) -> None:
    make_fleet(tmp_path, families=1, runs=1)
    first = loralens.load(tmp_path / "f0-r0" / "checkpoint-100")
    zero = first.map(lambda module: loralens.LowRank(np.zeros_like(module.B), module.A))
    loralens.save(zero, tmp_path / "zero")
    fleet = Fleet.open(tmp_path)
    fleet.update(tmp_path)
    assert [member.name for member in fleet.families().alone] == ["zero"]
    # It began from the same A as the others, however.
    assert [len(run.members) for run in fleet.runs()] == [4]
