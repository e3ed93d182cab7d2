"""The record of a grid of training runs, ``grid.json``, by which the folder of a grid is recognised."""

from pathlib import Path
from typing import Any

from loralens.errors import FormatError, place
from loralens.formats.files.container import read_json
from loralens.formats.files.location import NAMES
from loralens.formats.files.relative_name import is_relative_name
from loralens.formats.records.training import RUN

RECORD = "grid.json"
VERSION = 1
PARTS = ("runs", "parameters", "failed")  # mappings by the name of a run


def is_grid(folder: Path) -> bool:
    """Whether a folder is that of a grid."""
    return (folder / RECORD).is_file()


def read_grid(folder: Path) -> dict[str, Any]:
    """The record of a grid, whose parts are mappings by names of folders.

    Raises
    ------
    FormatError
        It is damaged.
    """
    with place(folder):
        record = read_json(folder / RECORD)
        if record.get("version") != VERSION or not all(isinstance(record.get(part), dict) for part in PARTS):
            raise FormatError(f"{RECORD} is not the record of a grid", fix="choose another folder")
        for name, settings in record["runs"].items():
            # The name becomes a path, and the file may come from anybody.
            if not isinstance(settings, dict) or not is_relative_name(name) or "/" in name:
                raise FormatError(f"{RECORD} has a run {name!r}, which is not one", fix="choose another folder")
    return record


def is_finished(run: Path) -> bool:
    """Whether the folder of a run is that of a finished one."""
    return (run / RUN).exists() and (run / NAMES[0]).exists()


def finished_runs(folder: Path) -> list[Path]:
    """The folders of the finished runs of a grid, in the order in which they were first asked for."""
    return [folder / name for name in read_grid(folder)["runs"] if is_finished(folder / name)]
