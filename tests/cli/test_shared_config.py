"""A file of PEFT shares ``adapter_config.json`` with its folder: no command changes it for the adapter beside it."""

import shlex
from pathlib import Path

import pytest

import loralens
from tests.bases import contents, sharded, tensors
from tests.cli.command import Command

# What each command is given besides the source and the target; two sources for those that take two.
WRITERS = {
    "compress": ("{a}", "--rank", "1"),
    "convert": ("{a}", "--to", "peft", "--dtype", "f32"),
    "convert --to mlx": ("{a}", "--to", "mlx"),
    "combine": ("{a}", "{a}:2"),
    "drop": ("{a}", "-m", "*.0.*"),
    "extract": ("--base", "{base}", "--tuned", "{tuned}", "--rank", "1", "--to", "peft"),
}


@pytest.fixture
def shared(small: Path, tmp_path: Path) -> Path:
    """A folder with one adapter in a file of its own name, and the configuration of its scale."""
    loralens.save(loralens.load(small), tmp_path / "ow" / "a.safetensors", format="peft")
    return tmp_path / "ow"


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("place", ["b.safetensors", ""])
@pytest.mark.parametrize("command", WRITERS)
def test_a_second_adapter_needs_a_folder_of_its_own(
    command: str, place: str, overwrite: bool, shared: Path, small: Path, tmp_path: Path
) -> None:
    before = contents(shared)
    sources = {"a": small, "base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    for number, model in enumerate(("base", "tuned")):
        sharded(sources[model], tensors(seed=number))
    args = [arg.format_map(sources) for arg in WRITERS[command]]
    run = Command(command.split()[0])
    said = run.refused(*args, "-o", shared / place, *["--overwrite"] * overwrite)
    assert "a.safetensors is read with it" in said
    assert contents(shared) == before
    # The advice works as it is typed.
    advised = shlex.split(said.partition("folder of its own: ")[2].splitlines()[0])
    run.good(*args, *advised)
    assert contents(shared).items() >= before.items()


def test_a_file_without_a_configuration_lies_beside_any_other(shared: Path, small: Path) -> None:
    before = contents(shared)
    Command("convert").good(small, "--to", "kohya", "-o", shared / "b.safetensors")
    assert contents(shared).items() >= before.items()
    # A file of kohya holds its own scales, so a new configuration changes nothing of it.
    (shared / "a.safetensors").unlink()
    (shared / "adapter_config.json").unlink()
    Command("convert").good(small, "--to", "peft", "-o", shared / "c.safetensors")


def test_a_new_configuration_would_change_a_file_that_has_none(shared: Path, small: Path) -> None:
    (shared / "adapter_config.json").unlink()
    said = Command("negate").refused(small, "-o", shared / "b.safetensors")
    assert "a.safetensors is read with it" in said


def test_a_configuration_whose_file_is_elsewhere_stays(shared: Path, small: Path) -> None:
    (shared / "a.safetensors").unlink()
    before = contents(shared)
    said = Command("negate").refused(small, "-o", shared / "b.safetensors", "--overwrite")
    assert "belongs to another file than b.safetensors" in said
    assert contents(shared) == before
