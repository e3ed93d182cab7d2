"""The pictures beside the Markdown: a file for every picture of the report."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.core.lowrank import LowRank
from loralens.reporting.collection import measure_collection
from loralens.reporting.document import Part, Picture, PictureRow, SideBySide
from loralens.reporting.markdown import report_markdown, report_pictures
from tests.reporting.adapters import drawn, measured, report

pytestmark = pytest.mark.slow

PNG = b"\x89PNG\r\n\x1a\n"


def _all(parts: Iterator[Part]) -> Iterator[Picture]:
    for part in parts:
        if isinstance(part, Picture):
            yield part
        if isinstance(part, PictureRow):
            yield from (one for _, one in part.pictures)
        if isinstance(part, SideBySide):
            for _, inner in part.columns:
                yield from _all(iter(inner))


def test_every_picture_of_a_report_has_a_file_that_its_text_names(tmp_path: Path) -> None:
    subjects = measured({"a": drawn(1), "b": drawn(2), "c": drawn(3)})
    found = report(subjects, [], collection=measure_collection(subjects))
    keys = [one.key for section in found.sections for one in _all(iter(section.parts))]
    assert {"spectra-1", "energy-2", "ranks-3", "shares-1", "curve-1", "pairs", "interference", "conflicts"} < set(keys)
    files, text = report_pictures(found), report_markdown(found, "x_files")
    assert list(files) == [f"{key}.png" for key in keys]
    assert all(content.startswith(PNG) for content in files.values())
    assert all(text.count(f"(x_files/{name})") == 1 for name in files)


def test_an_adapter_of_many_kinds_and_long_names_fits_its_picture() -> None:
    rng = np.random.default_rng(0)
    names = [f"encoder.layers.{block}.{'very_' * 8}long_{kind}" for block in range(20) for kind in range(30)]
    B, A = rng.standard_normal((4, 1)), rng.standard_normal((1, 4))
    subjects = measured({"a": loralens.Adapter(modules={name: LowRank(B, A, 1.0) for name in names})})
    for content in report_pictures(report(subjects, [])).values():
        assert content.startswith(PNG)
