"""``loralens.compress``: paths and objects, one result, the command's numbers, and nothing written unasked."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import loralens
from loralens import Adapter, OptionError, fingerprint
from tests.bases import contents
from tests.cli.command import Command
from tests.conftest import small_adapter

told = Command("compress").told


def plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("loralens", "source", "target")}


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 1},
        {"energy": 0.9, "uniform": True},
        {"error": 0.3, "modules": ["q_proj"]},
        {"sv_ratio": 2.1, "drop_dead": True},
        {"parameters": 80, "weights": "relative"},
        {"size": 1750},
        {"energy": 0.9, "to": "kohya", "dtype": "bf16", "force": True},
    ],
    ids=str,
)
def test_a_path_an_object_and_the_command_say_the_same(options: dict[str, Any], small: Path) -> None:
    arguments: list[object] = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        arguments += [option] if value is True else [option, *(value if isinstance(value, list) else [value])]
    record = told(small, "--dry-run", *arguments)
    by_path = loralens.compress(small, **options).record()
    by_object = loralens.compress(loralens.load(small), **options).record()
    assert plain(by_path) == plain(record)
    assert plain(by_object) == plain(record)
    assert record["source"] == by_path["source"] == by_object["source"] == str(small)


def test_without_output_the_result_holds_the_adapter_and_nothing_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = contents(small.parent)
    result = loralens.compress(loralens.load(small), rank=1)
    assert contents(small.parent) == before
    assert not list(tmp_path.iterdir())
    assert isinstance(result.adapter, Adapter)
    assert {module.rank for module in result.adapter.modules.values()} == {1}
    assert result.relative_error == pytest.approx((14 / 94) ** 0.5)
    assert result.record()["target"] is None
    assert not any("write" in line or "wrote" in line for line in result.sentences())


def test_with_output_it_is_what_was_read_back(small: Path, tmp_path: Path) -> None:
    result = loralens.compress(small, rank=1, output=tmp_path / "out", to="kohya")
    assert result.adapter.format == "kohya"
    assert fingerprint(result.adapter) == fingerprint(loralens.load(tmp_path / "out"))
    assert result.record()["target"] == str(tmp_path / "out")
    assert result.bytes_after == (tmp_path / "out" / "lora.safetensors").stat().st_size
    with pytest.raises(OptionError):
        loralens.compress(small, rank=1, output=tmp_path / "out", to="kohya")
    with pytest.raises(OptionError, match="is where the source is"):
        loralens.compress(small, rank=1, output=small, overwrite=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "how to choose the ranks"),
        ({"error": 0.1, "energy": 0.9}, "energy=, error= exclude each other"),
        ({"rank": 0}, "whole number from 1"),
        ({"rank": "8"}, "not a finite number"),
        ({"energy": 1.1}, "fraction in"),
        ({"error": 1}, "relative error in"),
        ({"sv_ratio": 0.5}, "ratio from 1"),
        ({"parameters": float("inf")}, "not a finite number"),
        ({"size": "20 parsecs"}, "is not a size"),
        ({"rank": 10**400}, "not a finite number"),
        ({"rank": 1, "to": "lycoris"}, "choose one of peft, kohya"),
        ({"rank": 1, "alpha": 3.0}, "states its own scale"),
    ],
    ids=str,
)
def test_wrong_values_are_option_errors(options: dict[str, Any], message: str, small: Path) -> None:
    with pytest.raises(OptionError) as refusal:
        loralens.compress(small, **options)
    assert message in str(refusal.value)


def test_plot_marks_what_was_chosen(small: Path) -> None:
    (axes,) = loralens.plot(loralens.compress(small, rank=1)).axes
    assert "what was written" in [line.get_label() for line in axes.lines]


@pytest.fixture
def full(tmp_path: Path) -> Path:
    """The folder of an adapter whose modules have all of their nominal rank, which `small` has not."""
    adapter = small_adapter()
    loralens.save(adapter.without([list(adapter)[-1]]), tmp_path / "full")
    return tmp_path / "full"


def test_what_gains_nothing_is_written_unchanged(full: Path, tmp_path: Path) -> None:
    result = loralens.compress(full, rank=2, output=tmp_path / "out")
    assert (result.kept_whole, result.smaller, result.answer, result.relative_error) == (True, False, True, 0)
    assert result.conclusion()[0].startswith(f"Wrote {tmp_path / 'out'}: {full} unchanged (")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (full, tmp_path / "out"))
    assert {key: array.tobytes() for key, array in before.items()} == {k: a.tobytes() for k, a in after.items()}


def test_only_if_smaller_writes_nothing_else(full: Path, tmp_path: Path) -> None:
    result = loralens.compress(full, rank=2, output=tmp_path / "out", only_if_smaller=True)
    assert (result.answer, result.output, result.record()["smaller"]) == (False, None, False)
    command = Command("compress")
    told = command.run(full, "--rank", 2, "-o", tmp_path / "out", "--only-if-smaller", "-q")
    assert told.exit_code == 1
    assert told.stdout.startswith(f"Nothing was written: the file would not be smaller than {full} (")
    assert not (tmp_path / "out").exists()
    # Another form is no reason to write it, where only a smaller file is wanted.
    assert not loralens.compress(full, rank=2, output=tmp_path / "out", dtype="f32", only_if_smaller=True).answer
    assert not (tmp_path / "out").exists()
    assert loralens.compress(full, rank=1, output=tmp_path / "out", only_if_smaller=True).answer
    assert (tmp_path / "out").exists()


def test_modules_that_stay_are_summed_up(small: Path, tmp_path: Path) -> None:
    command = Command("compress")
    told = command.good(small, "--rank", 1, "-m", "q_proj", "-o", tmp_path / "out").stdout
    assert "3 modules unchanged, -v shows all" in told
    assert "v_proj" not in told
    assert "v_proj" in command.good(small, "--rank", 1, "-m", "q_proj", "-o", tmp_path / "two", "-v").stdout
