"""``negate``, ``scale``, ``subtract``, ``interpolate`` and ``drop``: what they write is the arithmetic they say."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter

run = Command().run


@pytest.fixture
def other(tmp_path: Path) -> Path:
    loralens.save(2.5 * small_adapter(), tmp_path / "other")
    return tmp_path / "other"


def factors(found: loralens.Adapter, whole: loralens.Adapter) -> dict[str, float]:
    """By how much every module was multiplied, the one that is 0 left out."""
    multiples = {}
    for name in whole:
        D, R = whole[name].dense(), found[name].dense()
        if D.any():
            multiples[name] = float(np.sum(R * D) / np.sum(D * D))
            np.testing.assert_allclose(R, multiples[name] * D, atol=1e-5)
    return multiples


@pytest.mark.some(6)
@pytest.mark.parametrize(
    ("command", "inside", "outside"),
    [
        (["negate", "SMALL"], -1.0, 1.0),
        (["scale", "SMALL", "--by", "-0.5"], -0.5, 1.0),
        (["scale", "SMALL", "--by", "0"], 0.0, 1.0),
        (["subtract", "SMALL", "OTHER"], -1.5, 1.0),
        (["interpolate", "SMALL", "OTHER", "--at", "0.2"], 1.3, 1.0),
        (["interpolate", "SMALL", "OTHER", "--at", "-1"], -0.5, 1.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
@pytest.mark.parametrize("globs", [[], ["-m", "*.0.*"], ["-m", "q_proj", "-m", "*.1.*"]])
def test_the_arithmetic(
    small: Path, other: Path, tmp_path: Path, command: list[str], inside: float, outside: float, globs: list[str]
) -> None:
    spelled = {"SMALL": small, "OTHER": other}
    result = run(*(spelled.get(word, word) for word in command), *globs, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    for name, factor in factors(loralens.load(tmp_path / "out"), loralens.load(small)).items():
        hit = not globs or ".0." in name or (len(globs) > 2 and ("q_proj" in name or ".1." in name))
        hit = hit if len(globs) <= 2 else "q_proj" in name or ".1." in name
        assert factor == pytest.approx(inside if hit else outside, abs=1e-6), name


def test_a_multiple_keeps_the_stored_bits(small: Path, tmp_path: Path) -> None:
    run("negate", small, "-o", tmp_path / "out")
    found, whole = loralens.load(tmp_path / "out"), loralens.load(small)
    assert all(np.array_equal(found[name].B, whole[name].B) for name in whole)
    assert {found[name].scale for name in whole} >= {-4.0}
    run("negate", tmp_path / "out", "-o", tmp_path / "back")
    assert run("equal", small, tmp_path / "back", "--tolerance", "0").exit_code == 0


def test_what_is_equal_comes_out_as_zeros(small: Path, tmp_path: Path) -> None:
    run("subtract", small, small, "-o", tmp_path / "out")
    assert all(not m.B.any() for m in loralens.load(tmp_path / "out").modules.values())
    result = run("subtract", small, small, "-m", "*.0.*", "--drop-dead", "-o", tmp_path / "part", "--json")
    assert [m["rank"] for m in json.loads(result.stdout)["modules"]].count(0) == 3
    assert len(loralens.load(tmp_path / "part")) == 3


def test_drop_leaves_out_modules_and_nothing_else(small: Path, tmp_path: Path) -> None:
    result = run("drop", small, "-m", "v_proj", "-o", tmp_path / "out")
    assert result.stdout == f"Wrote {tmp_path / 'out'}: {small} without 3 of its 6 modules; 3 left (peft).\n"
    found, whole = loralens.load(tmp_path / "out"), loralens.load(small)
    assert [name for name in whole if "q_proj" in name] == list(found)
    assert all(np.array_equal(found[name].B, whole[name].B) for name in found)
    assert not any("v_proj" in target for target in found.config["target_modules"])
    record = json.loads(run("drop", small, "-m", "*.0.*", "--dry-run", "--json").stdout)
    assert (record["target"], record["left"], len(record["dropped"])) == (None, 4, 2)
