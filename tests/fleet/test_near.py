"""Search by example against brute force on dense matrices."""

import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Fleet, FormatError, OptionError
from loralens.fleet.likeness import ExactUpdate, exact_cosine
from tests.draws import draw_basis
from tests.fleet.makers import indexed
from tests.fleet.synthetic import adapter_of, dense_cosine, make_fleet, random_factors


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet")
    make_fleet(folder)
    return indexed(folder)


def brute_force(fleet: Fleet, example: loralens.Adapter, own: str = "") -> list[tuple[str, float]]:
    cosines = [(member.name, dense_cosine(example, fleet.adapter(member))[0]) for member in fleet.members()]
    return sorted((pair for pair in cosines if pair[0] != own), key=lambda pair: -pair[1])


@pytest.mark.parametrize("exact", [False, True])
def test_the_nearest_are_those_of_brute_force(fleet: Fleet, exact: bool) -> None:
    name = "f1-r0/checkpoint-200"
    result = fleet.near(fleet.root / name, 5, exact=exact)
    expected = brute_force(fleet, loralens.load(fleet.root / name), name)[:5]
    assert [row.member.name for row in result] == [pair[0] for pair in expected]
    np.testing.assert_allclose([row.cosine for row in result], [pair[1] for pair in expected], atol=1e-6)
    assert [row.level for row in result] == ["run", "run", "family", "family", "family"]
    assert result.compared == 26
    assert result.read == 26


def test_by_sketch_no_file_is_read(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet")
    example = loralens.load(shutil.copytree(tmp_path / "fleet/f0-r0/checkpoint-300", tmp_path / "example"))
    index = indexed(tmp_path / "fleet")
    cosines = dict(brute_force(index, example))
    for file in (tmp_path / "fleet").rglob("*.safetensors"):
        file.unlink()
    result = index.near(example, 9, sketch=True)
    assert {row.member.name.split("-")[0] for row in result} == {"f0"}
    assert all(
        not row.exact and row.common_cosine is None and abs(row.cosine - cosines[row.member.name]) < 0.06
        for row in result
    )
    assert result.read == 0


def test_a_part_of_the_modules_has_two_cosines(fleet: Fleet) -> None:
    whole = loralens.load(fleet.root / "f0-r1/checkpoint-300")
    part = whole["*.q_proj"]
    result = fleet.near(part, 1)
    expected = dense_cosine(part, whole)
    assert result[0].member.name == "f0-r1/checkpoint-300"
    assert result[0].exact
    assert (result[0].cosine, result[0].common_cosine) == pytest.approx(expected, abs=1e-6)
    assert result[0].common_cosine == pytest.approx(1)
    assert result[0].cosine < 0.8
    assert result[0].common_modules == 3


def test_the_same_update_in_other_factors_is_a_copy_and_in_half_strength_it_is_not(fleet: Fleet) -> None:
    adapter = loralens.load(fleet.root / "f0-r2/checkpoint-100")
    turn = draw_basis(0, 8, 8)
    turned = adapter.map(lambda m: loralens.LowRank(m.B @ turn, turn.T @ m.A, m.scale))
    assert [fleet.near(turned, 1)[0].level, fleet.near(turned, 1)[0].cosine] == ["copy", pytest.approx(1)]
    half = adapter.map(lambda m: loralens.LowRank(m.B, m.A, m.scale / 2))
    assert [fleet.near(half, 1)[0].level, fleet.near(half, 1)[0].cosine] == ["run", pytest.approx(1)]


def test_a_file_that_has_changed_is_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_fleet(tmp_path, families=1)
    index = indexed(tmp_path)
    (tmp_path / "f0-r0/checkpoint-300/adapter_model.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "loralens"):
        result = index.near("f0-r0/checkpoint-200")
    assert len(result) == 7
    assert "f0-r0/checkpoint-300" not in [row.member.name for row in result]
    assert "1 file left out, as they have changed since they were indexed: f0-r0/checkpoint-300" in caplog.text
    assert f"loralens fleet index {tmp_path}" in caplog.text


@pytest.mark.parametrize("options", [{}, {"sketch": True}])
def test_an_example_that_has_changed_is_refused(options: dict[str, bool], tmp_path: Path) -> None:
    make_fleet(tmp_path, families=1)
    index = indexed(tmp_path)
    os.utime(tmp_path / "f0-r0/checkpoint-200/adapter_model.safetensors")
    with pytest.raises(FormatError, match=r"checkpoint-200.*has changed since it was indexed"):
        index.near("f0-r0/checkpoint-200", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("R0/Checkpoint-1", r"the nearest names? in the fleet (is|are) f0-r0/checkpoint-100"),
        ("f0-r0/chekpoint-100", r"the nearest names in the fleet are f0-r0/checkpoint-100, "),
        ("quite another", "check the path"),
    ],
)
def test_a_misspelt_name_is_told_with_the_nearest_ones(fleet: Fleet, given: str, advice: str) -> None:
    with pytest.raises(OptionError, match="no adapter of the fleet has this name, and there is no such file") as raised:
        fleet.near(given)
    assert re.match(advice, raised.value.fix)


def test_exact_cosines_are_those_of_dense_matrices_in_every_gauge() -> None:
    rng = np.random.default_rng(3)
    first, second = (adapter_of(random_factors(rng), scale=-1.5) for _ in range(2))
    # Columns of lengths 1e-6 to 1e6, whose product is unchanged.
    lengths = 10.0 ** np.array([-6, -2, 2, 6])
    skewed = second.map(
        lambda m: loralens.LowRank(m.B.astype(float) * lengths, m.A.astype(float) / lengths[:, None], m.scale)
    )
    updates = [ExactUpdate.of(one) for one in (first, second, skewed)]
    expected = dense_cosine(first, second)[0]
    assert exact_cosine(updates[0], updates[1]).cosine == pytest.approx(expected, abs=1e-12)
    assert exact_cosine(updates[0], updates[2]).cosine == pytest.approx(expected, abs=1e-12)
