"""Writing findings as SARIF 2.1.0, which code hosts show beside the files of a change."""

import os
from collections.abc import Mapping, Sequence
from os.path import relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

from loralens.errors import FormatError, OptionError
from loralens.formats.files.atomic import atomic_file
from loralens.formats.files.container import read_json
from loralens.formats.files.disk import check_room
from loralens.formats.files.json_text import dumps
from loralens.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
Record = Mapping[str, str | None]  # level, code, adapter, module, evidence, fix


def sarif(findings: Sequence[Record], *, rules: Mapping[str, str], root: Path) -> str:
    """The text of a SARIF log. Equal findings give equal texts.

    Parameters
    ----------
    findings : sequence of mappings
        ``level`` (error, warning or note: SARIF's own words), ``code``, ``evidence``, ``fix``, ``adapter`` (the path of
        the file) and ``module`` or None.
    rules : mapping of str to str
        Code → its meaning. A code that is missing here becomes a rule with its name only.
    root : Path
        The folder of the repository, to which paths are made relative.
    """
    # Sorted, so that the log does not depend on the order of findings.
    codes = sorted({str(finding["code"]) for finding in findings})
    index = {code: i for i, code in enumerate(codes)}
    driver = {
        "name": "loralens",
        "version": __version__,
        "informationUri": "https://arxiv.org/abs/2106.09685",
        "rules": [_rule(code, rules.get(code, "")) for code in codes],
    }
    results = [_result(finding, index, root) for finding in findings]
    run = {"tool": {"driver": driver}, "columnKind": "unicodeCodePoints", "results": results}
    return dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def check_log_target(path: Path) -> None:
    """Refuse a path where no log can be written, before the checks run.

    Raises
    ------
    OptionError
        Its folder cannot be made, or the path is a folder, or a file with something else than such a log.
    """
    check_room(path)
    if path.is_dir():
        raise OptionError(f"{path}: is a folder", fix="give a file")
    if path.exists() and not _holds_log(path):
        raise OptionError(f"{path}: exists, and holds no log of findings", fix="choose another file")


def _holds_log(path: Path) -> bool:
    """Whether a file is empty or such a log, so that it may be replaced; an adapter or its configuration may not."""
    try:
        return path.stat().st_size == 0 or {"version", "runs"} <= read_json(path).keys()
    except (FormatError, OSError):
        return False


def write_sarif(text: str, path: Path) -> None:
    """Write a log, complete or not at all. An old log is replaced without asking: every CI job writes it anew."""
    with atomic_file(path) as stream:
        stream.write(text.encode("utf-8"))


def _rule(code: str, meaning: str) -> dict[str, Any]:
    words = code.replace("-", " ")
    description = {"text": meaning or f"Found by the reader of the file: {words}."}
    return {
        "id": code,
        "name": "".join(part.capitalize() for part in code.split("-")),
        "shortDescription": {"text": words[:1].upper() + words[1:]},
        "fullDescription": description,
        "help": description,
    }


def _result(finding: Record, index: Mapping[str, int], root: Path) -> dict[str, Any]:
    module, fix, code = finding["module"], finding["fix"], str(finding["code"])
    # Code hosts show the message beside the file, so it has the module and the advice too.
    text = (f"{module}: " if module else "") + str(finding["evidence"]) + (f"\nFix: {fix}" if fix else "")
    location: dict[str, Any] = {"physicalLocation": {"artifactLocation": {"uri": _uri(str(finding["adapter"]), root)}}}
    # A finding about the whole file has no module.
    if module:
        location["logicalLocations"] = [{"fullyQualifiedName": module, "kind": "module"}]
    return {
        "ruleId": code,
        "ruleIndex": index[code],
        "level": finding["level"],
        "message": {"text": text},
        "locations": [location],
    }


def _uri(path: str, root: Path) -> str:
    """The path as a relative URI reference: with ``/``, and quoted where a URI demands it."""
    file = Path(path)
    # There is no relative path between two drives of Windows.
    if file.is_absolute() and file.anchor == root.anchor:
        file = Path(relpath(file, root))
    return file.as_uri() if file.is_absolute() else quote(os.fsencode(file.as_posix()))
