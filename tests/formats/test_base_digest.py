"""The digest of a base: other numbers, names and tokenizers are noticed, places and times are not."""

import os
import shutil
from pathlib import Path

import pytest

from loralens.formats.models import base_cache as module
from loralens.formats.models.base_cache import base_digest


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


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "config.json", "tokenizer.json", "added.safetensors"),
        # what says how codes are read, which shard has a tensor, and what is a token
        *("quantize_config.json", "model.safetensors.index.json", "added_tokens.json", "special_tokens_map.json"),
        *("qwen.tiktoken", "chat_template.jinja"),
    ],
)
def test_what_is_another(base: Path, name: str) -> None:
    digest = base_digest(base)
    kept = (base / name).read_bytes() if (base / name).exists() else b""
    (base / name).write_bytes(b"!" + kept[1:])
    assert base_digest(base) != digest


def test_the_components_of_a_pipeline_count(base: Path) -> None:
    (base / "unet").mkdir()
    component = base / "unet" / "diffusion_pytorch_model.safetensors"
    digests = set()
    for content in (b"1", b"2"):
        component.write_bytes(content)
        digests.add(base_digest(base))
    assert len(digests) == 1  # beside weights they are not read
    (base / "model.safetensors").unlink()
    for content in (b"1", b"2"):
        component.write_bytes(content)
        digests.add(base_digest(base))
    assert len(digests) == 3


def test_every_byte_of_a_large_file_counts(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge into one module may change a few bytes anywhere, and neither the size nor the time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SETTLED", -1)  # so that the digest of a new file is kept, too
    file = base / "model.safetensors"
    file.write_bytes(bytes(module.KEPT_FROM + module.BLOCK))
    written = file.stat()
    digests = {base_digest(base)}
    for place in (0, 70_000, module.KEPT_FROM + 99):
        with file.open("rb+") as stream:
            stream.seek(place)
            stream.write(b"!")
        os.utime(file, ns=(written.st_atime_ns, written.st_mtime_ns))
        digests.add(base_digest(base))
    assert len(digests) == 4


def test_a_large_file_is_read_completely_once(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = base / "model.safetensors"
    file.write_bytes(bytes(module.KEPT_FROM))
    kept = tmp_path / "cache" / "loralens" / "digests"
    digest = base_digest(base)
    # Two changes of a file that was written just now could have one stamp.
    assert not kept.exists()
    monkeypatch.setattr(module, "SETTLED", -1)
    assert base_digest(base) == digest
    (entry,) = kept.iterdir()
    entry.write_text("0" * 64)
    assert base_digest(base) != digest  # the entry is used
    entry.write_text("damaged")
    assert base_digest(base) == digest
    assert entry.read_text() != "damaged"
