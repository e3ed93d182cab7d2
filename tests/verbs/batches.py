"""Folders of adapters for the tests of verbs that take several: copies of those that were trained for the project."""

import shutil
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

TRAINED = ROOT / "examples" / "adapters"
NAMES = ("20newsgroups-r8-seed0", "reuters-r8-r8-seed0", "tweet-sentiment-r8-seed0")


def lay_adapters(folder: Path, *names: str) -> Path:
    """A folder with copies of trained adapters, which are called a, b, c …"""
    for letter, name in zip("abcdef", names or NAMES, strict=False):
        shutil.copytree(TRAINED / name, folder / letter)
    return folder


def spoil(adapter: Path) -> None:
    """Let an adapter be no tensor file any more."""
    (adapter / "adapter_model.safetensors").write_bytes(b"no tensors at all")


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too, with its content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def statuses(result: Any) -> dict[str, str]:
    """The status of every adapter by its name."""
    return {row.name: row.status for row in result}
