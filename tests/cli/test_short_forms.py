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


def test_every_command_understands_a_word_as_drop_does(tmp_path: Path) -> None:
    text_encoder = [f"lora_te_text_model_encoder_layers_{i}_mlp_fc1" for i in (0, 1)]
    names = ["lora_unet_mid_block_attentions_0_proj_in", *text_encoder]
    file = tmp_path / "a.safetensors"
    made = loralens.Adapter(modules={name: loralens.LowRank(np.ones((3, 2)), np.ones((2, 4))) for name in names})
    loralens.save(made, file, format="kohya")
    shown = json.loads(run("inspect", file, "-m", "te", "--json").stdout)
    assert [module["name"] for module in shown["adapters"][0]["modules"]] == text_encoder
    result = run("drop", file, "-m", "te", "-o", tmp_path / "unet.safetensors")
    assert result.exit_code == 0, result.stderr
    assert list(loralens.load(tmp_path / "unet.safetensors")) == names[:1]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["drop", "SMALL", "-m", "*", "-o", "OUT"], 2, "nothing would be left"),
        (["drop", "SMALL", "-m", "*nosuch*", "-o", "OUT"], 2, "no name contains 'nosuch'"),
        (["drop", "SMALL", "-m", "k_proj", "-o", "OUT"], 2, "the nearest names are"),
        (["drop", "SMALL", "-o", "OUT"], 2, "--modules"),
        (["drop", "SMALL", "-m", "v_proj"], 2, "-o"),
        (["negate", "SMALL"], 2, "-o"),
        (["negate", "SMALL", "-o", "SMALL"], 2, "is where the source is"),
        (["negate", "SMALL", "-m", "k_proj", "-o", "OUT"], 2, "no module matches"),
        (["scale", "SMALL", "-o", "OUT"], 2, "--by"),
        (["scale", "SMALL", "--by", "nan", "-o", "OUT"], 2, "finite"),
        (["interpolate", "SMALL", "SMALL", "-o", "OUT"], 2, "--at"),
    ],
)
def test_what_is_wrong_says_so(small: Path, tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    spelled = {"SMALL": small, "OUT": tmp_path / "out"}
    result = run(*(spelled.get(word, word) for word in arguments))
    assert (result.exit_code, message in result.stderr) == (code, True), result.stderr


@pytest.mark.parametrize(
    "command",
    [["combine", "TINY", "TINY"], ["scale", "TINY", "--by", "2"], ["drop", "TINY", "-m", "m.v"]],
    ids=" ".join,
)
def test_what_rounding_costs_is_said_and_much_is_refused(command: list[str], tmp_path: Path) -> None:
    """Of the written file against the exact combination."""
    rng = np.random.default_rng(5)
    A, B = rng.standard_normal((2, 5)).astype(np.float32), rng.standard_normal((6, 2)).astype(np.float32)
    modules = {"m.q": loralens.LowRank((1e-14 * B).astype(np.float32), A), "m.v": loralens.LowRank(B, A)}
    loralens.save(loralens.Adapter(modules=modules), tmp_path / "tiny")
    words = [tmp_path / "tiny" if word == "TINY" else word for word in command]
    words += ["-o", tmp_path / "out", "--dtype", "f16"]
    refused = run(*words)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "m.q: rounding to f16 costs" in refused.stderr
    assert not (tmp_path / "out").exists()
    words.append("--allow-loss")
    record = json.loads(run(*words, "--json").stdout)
    told = record["rounding"] if command[0] == "drop" else record["total"]["rounding"]
    new = loralens.load(tmp_path / "out")
    factor = 1.0 if command[0] == "drop" else 2.0
    errors = {}
    for name in new:
        whole = factor * modules[name].dense()
        errors[name] = np.linalg.norm(new[name].dense() - whole) / np.linalg.norm(whole)
    worst = max(errors, key=lambda name: errors[name])
    assert told["worst"] == {"module": worst, "error": pytest.approx(errors[worst], rel=1e-5)}
    assert errors[worst] > 0.01
    assert "rounding    ‖ΔW−ΔW'‖/‖ΔW‖ = " in run(*words, "--overwrite").stdout
