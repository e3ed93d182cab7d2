"""Families and runs against a truth."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Fleet
from tests.draws import draw_basis
from tests.fleet.makers import indexed
from tests.fleet.synthetic import Entry, adapter_of, adjusted_rand, dense_cosine, make_fleet, random_factors


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Fleet, list[Entry]]:
    folder = tmp_path_factory.mktemp("fleet")
    truth = make_fleet(folder)
    fleet = indexed(folder)
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
    turn = draw_basis(0, 8, 8)
    turned = adapter.map(lambda m: loralens.LowRank(m.B @ turn, turn.T @ m.A, m.scale))
    loralens.save(turned, tmp_path / "turned")
    fleet = indexed(tmp_path)
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
    fleet = indexed(tmp_path)

    def cosines(families: Iterable[Any]) -> list[float]:
        return [dense_cosine(*map(fleet.adapter, family.members))[0] for family in families]

    assert min(cosines(fleet.families())) >= 0.5
    sketched = fleet.families(sketch=True)
    assert min(cosines(sketched)) < 0.5
    assert "(mean cosine by sketches at least 0.5)" in sketched.conclusion()[0]


def test_an_adapter_that_is_0_is_in_no_group(tmp_path: Path) -> None:
    make_fleet(tmp_path, families=1, runs=1)
    first = loralens.load(tmp_path / "f0-r0" / "checkpoint-100")
    zero = first.map(lambda module: loralens.LowRank(np.zeros_like(module.B), module.A))
    loralens.save(zero, tmp_path / "zero")
    fleet = indexed(tmp_path)
    assert [member.name for member in fleet.families().alone] == ["zero"]
    # It began from the same A as the others, however.
    assert [len(run.members) for run in fleet.runs()] == [4]
