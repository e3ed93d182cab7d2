"""Writing a report to disk: all files complete, and none in place before all of them are."""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from loralens.errors import OptionError
from loralens.formats.files.atomic import atomic_file, atomic_path, tidy
from loralens.formats.files.disk import check_room, disk_errors
from loralens.reporting.document import Report
from loralens.reporting.html import report_html_parts

SUFFIX = ".html"


def markdown_paths(page: Path) -> tuple[Path, Path]:
    """The paths of the Markdown file and of the folder of its pictures, which stand next to a page."""
    return page.with_suffix(".md"), page.with_name(f"{page.stem}_files")


def check_report_target(page: Path, *, with_markdown: bool, overwrite: bool) -> None:
    """Refuse a target to which the report cannot be written, before anything is measured.

    Raises
    ------
    OptionError
        A suffix other than .html; a file that exists although ``overwrite`` is false; a file where a folder must be.
    """
    if page.suffix != SUFFIX:
        raise OptionError(
            f"{page}: a report is a .html page",
            fix=f"end the name in {SUFFIX}; --markdown writes it as Markdown too, and a browser prints it as PDF",
        )
    text, folder = markdown_paths(page)
    for target in (page, *((text, folder) if with_markdown else ())):
        # lexists: a link that leads nowhere would be replaced too.
        if os.path.lexists(target) and not overwrite:
            raise OptionError(f"{target}: exists", fix="choose another target, or give --overwrite")
        if target != folder and target.is_dir():
            raise OptionError(f"{target}: is a folder", fix="choose another target")
    # The folder is replaced as a whole, so it may hold nothing but pictures of an earlier report.
    if with_markdown and folder.exists():
        strangers = [] if folder.is_dir() else [folder.name]
        strangers += [entry.name for entry in folder.glob("*") if entry.suffix != ".png" or entry.is_dir()]
        if strangers:
            raise OptionError(
                f"{folder}: holds files that are not pictures, such as {strangers[0]}", fix="choose another target"
            )
    check_room(page)


def write_report(report: Report, page: Path, *, with_markdown: bool = False) -> list[Path]:
    """Write the page, and the Markdown and its pictures if asked for; return the paths that were written.

    Missing folders are made. The same report gives the same bytes.

    Raises
    ------
    FormatError
        The files cannot be written.
    """
    text, folder = markdown_paths(page)
    pictures: Mapping[str, bytes] = {}
    if with_markdown:
        from loralens.reporting.markdown import report_markdown, report_pictures  # most reports are pages alone

        # Before anything is written, so that an error in a picture leaves no half report.
        pictures = report_pictures(report)
    # The files are complete before the stack is left, and only then put in place: an error leaves the old report.
    with ExitStack() as stack:
        stream = stack.enter_context(atomic_file(page))
        # Part by part, since a page of many long names is several times as large as the adapter.
        for part in report_html_parts(report):
            stream.write(part.encode("utf-8"))
        if with_markdown:
            stack.enter_context(atomic_file(text)).write(report_markdown(report, folder.name).encode("utf-8"))
            _write_folder(folder, pictures)
    return [page, *([text, folder] if with_markdown else [])]


def _write_folder(folder: Path, pictures: Mapping[str, bytes]) -> None:
    """Write the pictures in place of those of an earlier report."""
    # A run that was killed may have left a part beside the folder, or moved the old folder aside.
    with disk_errors(folder):
        tidy(folder)
    with atomic_path(folder, folder=True, overwrite=True) as part:
        for name, content in pictures.items():
            (part / name).write_bytes(content)
