"""``loralens similarity`` of three and more: exact output on a small collection, the JSON contract."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command

N = 40

run = Command("similarity").run


def adapter(angle: float, axis: int, blocks: range = range(3), v: float = 1.0) -> loralens.Adapter:
    """Rank one everywhere: out direction turned by ``angle`` towards ``axis``, in direction the first axis."""
    modules = {}
    for i in blocks:
        for kind, sign in (("q", 1.0), ("v", v)):
            B, A = np.zeros((N, 1), np.float32), np.zeros((1, N), np.float32)
            B[0], B[axis], A[0, 0] = sign * np.cos(angle), sign * np.sin(angle), 1
            modules[f"layers.{i}.{kind}"] = loralens.LowRank(B, A)
    return loralens.Adapter(modules=modules)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """b is near a, d fights a in every v, c has an A of its own and lacks the last block."""
    folder = tmp_path_factory.mktemp("collection")
    away = adapter(0.5, 3, range(2)).map(lambda m: loralens.LowRank(m.B, 0.2 * m.A + np.roll(m.A, 5), m.scale))
    made = {"a": adapter(0.0, 1), "b": adapter(0.3, 2), "c": away, "d": adapter(0.2, 4, v=-0.5)}
    for name, one in made.items():
        loralens.save(one, folder / name)
    return [folder / name for name in made]


def test_json_keeps_its_contract(collection: list[Path]) -> None:
    record = json.loads(run("--json", "--phi", *collection).stdout)
    assert (record["loralens"], record["of"], record["side"]) == (loralens.__version__, "update", "out")
    assert record["adapters"] == [str(path) for path in collection]
    assert [(pair["first"], pair["second"]) for pair in record["pairs"]] == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3),
    ]  # fmt: skip
    first = record["pairs"][0]["modules"]
    assert [module["name"] for module in first] == [f"layers.{i}.{kind}" for i in range(3) for kind in "qv"]
    assert set(first[0]) >= {"phi", "chance", "cosine", "cosine_z", "principal_angles"}
    assert len(record["pairs"][1]["modules"]) == 4
    cosine = np.array(record["cosine"])
    assert cosine[0, 1] == pytest.approx(np.cos(0.3), abs=1e-6)
    assert cosine[0, 3] == pytest.approx(np.cos(0.2) * (1 - 0.5) / (2 * 1.25) ** 0.5, abs=1e-6)
    assert record["cosine_z"][0][1] == pytest.approx(np.cos(0.3) * N * 6**0.5, rel=1e-5)
    assert record["phi"]["out"][0][1] == pytest.approx(np.cos(0.3) ** 2, abs=1e-6)
    assert record["chance"]["in"][0][1] == pytest.approx(1 / N)
    assert record["common_modules"][0] == [6, 6, 4, 6]
    assert record["shared_initialisation"][0] == pytest.approx([1, 1, 0.2 / 1.04**0.5, 1])
    assert record["groups"] == [[0, 1, 3], [2]]
    assert sorted(record["order"]) == [0, 1, 2, 3]
    assert set(record["interference"][0]) == {
        "name", "shape", "cosine", "shared", "private", "shared_chance", "private_chance",
    }  # fmt: skip
    assert record["interference"][5]["shared"][2] is None
    fight = record["fights"][0]
    assert (fight["first"], fight["second"], fight["blocks"], fight["kinds"]) == (0, 3, [0, 2], ["v"])
    assert fight["cosine"] == pytest.approx(-np.cos(0.2), abs=1e-6)


def test_side_rank_factor_and_modules_are_passed_on(collection: list[Path]) -> None:
    record = json.loads(run("--json", "--of", "B", "-m", "q", *collection).stdout)
    assert (record["of"], record["side"], list(record["phi"])) == ("B", "out", ["out"])
    assert {module["name"] for pair in record["pairs"] for module in pair["modules"]} == {
        "layers.0.q", "layers.1.q", "layers.2.q",
    }  # fmt: skip
    shown = run("--side", "out", *collection).stdout
    assert "φ, out side" in shown
    assert "φ, in side" not in shown


def test_no_module_in_common_is_exit_2(collection: list[Path], tmp_path: Path) -> None:
    for i in range(3):
        module = adapter(0.1, 1)["layers.0.q"]
        loralens.save(loralens.Adapter(modules={f"model{i}.q": module}), tmp_path / f"m{i}")
    result = run(*(tmp_path / f"m{i}" for i in range(3)))
    assert result.exit_code == 2
    assert "no two of these adapters have a module in common" in result.stderr


def test_an_adapter_that_cannot_be_compared_is_named(collection: list[Path], tmp_path: Path) -> None:
    stranger = loralens.Adapter(modules={"head": loralens.LowRank(np.ones((3, 1)), np.ones((1, 5)))})
    loralens.save(stranger, tmp_path / "stranger")
    text = run(*collection[:2], tmp_path / "stranger").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("not compared: ")]
    assert line.endswith("stranger has no module of the others' names and shapes")
    row = next(line for line in text.splitlines() if "stranger  " in line)
    assert row.split()[2:5] == ["0", "–", "–"]
