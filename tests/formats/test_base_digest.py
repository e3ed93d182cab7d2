"""The digest of a base: other numbers, names and tokenizers are noticed, places and times are not."""

import shutil
from pathlib import Path

import pytest

from loralens.errors import FormatError
from loralens.formats.models import base_digest as module
from loralens.formats.models.base_digest import base_digest


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_what_is_the_same_base(base: Path, tmp_path: Path) -> None:
    digest = base_digest(base)
    assert len(digest) == 64
    shutil.copytree(base, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "README.md").write_text("words")
    assert base_digest(tmp_path / "elsewhere") == digest
    assert base_digest(base / "model.safetensors") != digest


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "added.safetensors"])
def test_what_is_another(base: Path, name: str) -> None:
    digest = base_digest(base)
    kept = (base / name).read_bytes() if (base / name).exists() else b""
    (base / name).write_bytes(b"!" + kept[1:])
    assert base_digest(base) != digest


def test_of_a_large_file_blocks_from_end_to_end_are_read(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)
    monkeypatch.setattr(module, "BLOCKS", 4)
    file, digest = base / "model.safetensors", base_digest(base)
    kept = file.read_bytes()
    for changed in (b"!" + kept[1:], kept[:-1] + b"!", bytes(255 - byte for byte in kept), kept + b"!"):
        file.write_bytes(changed)
        assert base_digest(base) != digest
    file.write_bytes(kept)
    assert base_digest(base) == digest


def test_a_file_that_cannot_be_read_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(FormatError, match=r"config\.json: cannot be read: Permission denied"):
        base_digest(base)
