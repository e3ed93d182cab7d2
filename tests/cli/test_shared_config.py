"""A file of PEFT shares ``adapter_config.json`` with its folder: no command changes it for the adapter beside it."""

import shlex
import sys
from pathlib import Path

import pytest

import loralens
from loralens.errors import OptionError
from tests.bases import contents, sharded, tensors
from tests.cli.command import Command

MODEL = "adapter_model.safetensors"
# What each command is given besides the source and the target; two sources for those that take two.
WRITERS = {
    "compress": ("{a}", "--rank", "1"),
    "scale": ("{a}", "--by", "8"),
    "convert": ("{a}", "--to", "peft", "--dtype", "f32"),
    "convert --to mlx": ("{a}", "--to", "mlx"),
    "combine": ("{a}", "{a}:2"),
    "subtract": ("{a}", "{other}"),
    "interpolate": ("{a}", "{a}", "--at", "0.5"),
    "negate": ("{a}",),
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
    sources = {"a": small, "other": tmp_path / "other", "base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    loralens.save(loralens.load(small) * 2, sources["other"], format="peft")
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


def test_python_saves_no_second_adapter_either(shared: Path, small: Path) -> None:
    before = contents(shared)
    other = loralens.load(small) * 8
    for target in (shared / "b.safetensors", shared):
        with pytest.raises(OptionError, match="read with it"):
            loralens.save(other, target, format="peft", overwrite=True)
    assert contents(shared) == before


@pytest.mark.parametrize("name", ["a.safetensors", MODEL])
def test_the_only_adapter_of_a_folder_is_replaced(name: str, small: Path, tmp_path: Path) -> None:
    target, other = tmp_path / "ow" / name, loralens.load(small) * 8
    loralens.save(loralens.load(small), target, format="peft")
    (tmp_path / "ow" / "optimizer.pt").write_bytes(b"of the trainer")
    loralens.save(other, target, format="peft", overwrite=True)
    assert loralens.load(target)[next(iter(other))].scale == other[next(iter(other))].scale


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


def test_pickles_do_not_share_their_record(small: Path, tmp_path: Path) -> None:
    Command("convert").good(small, "--to", "loralib", "-o", tmp_path / "ow" / "a.bin")
    before = contents(tmp_path / "ow")
    said = Command("scale").refused(
        small, "--by", "8", "--to", "loralib", "-o", tmp_path / "ow" / "b.bin", "--overwrite"
    )
    assert "a.bin is read with it" in said
    assert contents(tmp_path / "ow") == before


def test_a_file_of_torch_keeps_its_record_where_there_is_no_torch(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Command("convert").good(small, "--to", "loralib", "-o", tmp_path / "ow" / "a.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    said = Command("scale").refused(small, "--by", "8", "--to", "peft", "-o", tmp_path / "ow" / "b.safetensors")
    assert "a.bin is read with it" in said


def test_a_record_that_its_configuration_contradicts_is_named(small: Path, tmp_path: Path) -> None:
    """As older releases left it: the configuration of another adapter beside a file with a record of its scales."""
    loralens.save(loralens.load(small), tmp_path / "k.safetensors", format="kohya")
    loralens.convert(tmp_path / "k.safetensors", output=tmp_path / "ow" / "a.safetensors", to="peft")
    config = tmp_path / "ow" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": ', '"lora_alpha": 8'))
    assert "another scale than the record" in Command("inspect").good(tmp_path / "ow" / "a.safetensors").stdout
