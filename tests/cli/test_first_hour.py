"""What hobbyists type before they read: the answer says what they meant."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.cli.command import Command


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("scale", "SMALL", "0,5", "-o", "x"), "give the factor with --by: --by 0.5"),
        (("inspect", "SMALL", "0,5"), "a number needs its option, such as --by 0.5"),
        (("scale", "SMALL", "--by", "0,5", "-o", "x"), "numbers have a point: 0.5"),
        (("convert", "SMALL", "--to", "a1111", "-o", "x"), "for a1111 there is --to kohya"),
        (("inspect", "SMALL", "--for", "A1111"), "for A1111 there is --for sd-scripts"),
        (("spectrum", "SMALL", "--layers", "0-3"), "for that there is --block"),
        (("spectrum", "SMALL", "--plot", "x.pdf", "--dpi", "300"), "for that there is --figure-dpi"),
        (("combine", "SMALL", "SMALL", "--out", "x"), "for that there is --output"),
    ],
)
def test_wrong_usage_is_answered_with_what_was_meant(words: tuple[str, ...], hint: str, small: Path) -> None:
    said = Command().refused(*(small if word == "SMALL" else word for word in words))
    assert f"\n  fix: {hint}" in said


def test_what_was_meant_stands_alone(small: Path) -> None:
    said = Command("spectrum").refused(small, "--plot", "x.pdf", "--dpi", "300")
    assert "--device" not in said
    assert "the nearest options are --plot, " in Command("spectrum").refused(small, "--plott", "x.pdf")


@pytest.mark.parametrize(("option", "name"), [("--csv", "out.csv"), ("--json", "out.JSON")])
def test_a_file_after_an_option_that_takes_none(option: str, name: str, small: Path, tmp_path: Path) -> None:
    said = Command("spectrum").refused(small, option, tmp_path / name)
    assert f"{option} takes no file: to write {tmp_path / name}, end the command with > {tmp_path / name}" in said
    assert "takes no file" not in Command("spectrum").refused(small, tmp_path / name)


@pytest.mark.parametrize("words", [("scale", "SMALL", "--by", "x", "-o", "y"), ("convert", "SMALL", "--to", "exe")])
def test_other_wrong_usage_gets_no_guess(words: tuple[str, ...], small: Path) -> None:
    assert "fix:" not in Command().refused(*(small if word == "SMALL" else word for word in words))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-output", "x", "--rank", "2"), "-output has two dashes: --output"),
        (("-o", "x", "-rank", "2"), "-rank has two dashes: --rank"),
        (("-o=x", "--rank", "2"), "-o=x has no =: write -o x"),
    ],
)
def test_an_option_with_one_dash_becomes_no_part_of_a_name(
    words: tuple[str, ...], said: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in Command("compress").refused(small, *words)
    assert not any(path.name in ("x", "=x", "utput", "utput=x") for path in tmp_path.iterdir())


def test_short_options_may_be_joined_with_their_values(small: Path, tmp_path: Path) -> None:
    Command("compress").good(small, f"-o{tmp_path / 'x'}", "--rank=2", "-q")
    assert (tmp_path / "x").exists()
    # After two dashes a word is a name, whatever it looks like.
    assert Command("inspect").refused("--", "-output").startswith("error: -output: ")


def test_a_misspelt_file_is_answered_with_the_nearest_one(small: Path, tmp_path: Path) -> None:
    loralens.convert(small, to="kohya", output=tmp_path / "mein stil (größer).safetensors")
    said = Command("inspect").refused(tmp_path / "mein stil (größer).safetensor")
    assert f"fix: the nearest name there is {tmp_path / 'mein stil (größer).safetensors'}" in said
    assert "nearest" not in Command("inspect").refused(tmp_path / "other.safetensors")
    (tmp_path / "fleet").mkdir()
    (tmp_path / "fleeT-b").mkdir()
    assert f"the nearest name there is {tmp_path / 'fleeT-b'}" in Command("inspect").refused(tmp_path / "FLEET-B")


@pytest.mark.parametrize("name", ["out.safetensor", "out.safetensros", "out.SAFETENSORS", "out.CKPT"])
def test_a_misspelt_suffix_makes_no_folder_of_that_name(name: str, small: Path, tmp_path: Path) -> None:
    said = Command("convert").refused(small, "--to", "kohya", "-o", tmp_path / name)
    assert "fix: a file ends in .safetensors" in said
    assert not (tmp_path / name).exists()


def test_the_same_finding_of_several_files_is_told_once(tmp_path: Path) -> None:
    """Files of SAM-LoRA have numbers for names, which is a note with a fix about each of them."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{name}.safetensors" for name in ("first", "second", "third")]
    for file in files:
        factors = {"w_a_000": (2, 16), "w_b_000": (16, 2), "w_a_001": (2, 16), "w_b_001": (16, 2)}
        save_file({key: rng.standard_normal(shape).astype(np.float32) for key, shape in factors.items()}, file)
    told = Command("similarity").good(*files).stderr
    assert told.count("modules have numbers, not names") == told.count("  fix:") == 1
    assert f"note: {files[2]}: the same as for {files[0]}" in told
    # Only the conclusion: a note does not change what it means.
    assert Command("similarity").good(*files, "--quiet").stderr == ""
    assert "numbers, not names" in Command("inspect").good(files[0]).output
