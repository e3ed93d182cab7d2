"""A report on disk: every file whole, and none in place before all of them are."""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from loralens.errors import OptionError
from loralens.formats.files.atomic import atomic_file, atomic_path
from loralens.formats.files.disk import disk_errors
from loralens.formats.files.leftovers import tidy
from loralens.reporting.document import Report
from loralens.reporting.html import html_parts
from loralens.reporting.markdown import markdown, pictures

SUFFIX = ".html"


def beside(page: Path) -> tuple[Path, Path]:
    """The Markdown file beside a page, and the folder of its pictures."""
    return page.with_suffix(".md"), page.with_name(f"{page.stem}_files")


def check_target(page: Path, *, with_markdown: bool, overwrite: bool) -> None:
    """Refuse a place where the report cannot be written, before any work.

    Raises
    ------
    OptionError
        Another suffix than .html; a file that is there, where ``overwrite`` is false; a folder that is a file.
    """
    if page.suffix != SUFFIX:
        raise OptionError(f"{page}: a report is a .html page", fix=f"end the name in {SUFFIX}")
    text, folder = beside(page)
    for target in (page, *((text, folder) if with_markdown else ())):
        if os.path.lexists(target) and not overwrite:
            raise OptionError(f"{target}: exists", fix="choose another target, or give --overwrite")
    for target in (page, *((text,) if with_markdown else ())):
        if target.is_dir():
            raise OptionError(f"{target}: is a folder", fix="choose another target")
    if with_markdown and folder.exists():
        strangers = [] if folder.is_dir() else [folder.name]
        strangers += [one.name for one in folder.glob("*") if one.suffix != ".png" or one.is_dir()]
        if strangers:
            raise OptionError(
                f"{folder}: holds other things than pictures: {strangers[0]}", fix="choose another target"
            )
    there = next(parent for parent in page.absolute().parents if parent.exists())
    if not there.is_dir():
        raise OptionError(f"{there}: is a file, not a folder", fix="choose another target")


def write_report(report: Report, page: Path, *, with_markdown: bool = False) -> list[Path]:
    """Write the page, and beside it the Markdown and its pictures; what was written.

    Folders on the way are made. Same report, same bytes.

    Raises
    ------
    FormatError
        The disk refuses.
    """
    text, folder = beside(page)
    contents: dict[Path, bytes] = {page: b"".join(part.encode("utf-8") for part in html_parts(report))}
    drawn: Mapping[str, bytes] = {}
    if with_markdown:
        drawn = pictures(report)
        contents[text] = markdown(report, folder.name).encode("utf-8")
    with disk_errors(page.parent):
        page.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(atomic_file(path)).write(content)
        if with_markdown:
            _write_folder(folder, drawn)
    return [*contents, *([folder] if with_markdown else [])]


def _write_folder(folder: Path, drawn: Mapping[str, bytes]) -> None:
    """The pictures, in place of those that were there."""
    with disk_errors(folder):
        tidy(folder)
    with atomic_path(folder, folder=True, overwrite=True) as part:
        for name, content in drawn.items():
            (part / name).write_bytes(content)


def numbers(report: Report) -> str:
    """The numbers of the report as JSON."""
    return json.dumps(report.record, allow_nan=False)
