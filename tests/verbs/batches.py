"""Folders of adapters for the tests of verbs that take several: copies of those that were trained for the project."""

import json
import shutil
from pathlib import Path
from typing import Any

from loralens.formats.files.location import RECORD_NAME
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


def outputs_under(folder: Path) -> dict[str, bytes]:
    """`files_under` a folder without the record of the run."""
    return {name: content for name, content in files_under(folder).items() if name != RECORD_NAME}


def read_record(folder: Path) -> Any:
    return json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))


def write_record(folder: Path, record: object) -> None:
    (folder / RECORD_NAME).write_text(json.dumps(record), encoding="utf-8")


def statuses(result: Any) -> dict[str, str]:
    """The status of every adapter by its name."""
    return {row.name: row.status for row in result}
