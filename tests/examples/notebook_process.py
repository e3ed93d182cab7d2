"""``python -m tests.examples.notebook_process FILE`` runs the cells of a notebook as a kernel does, from top to bottom.

It prints, as JSON, the text that all cells print and the number of pictures that they show.
"""

import json
import sys
from pathlib import Path

import nbformat
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.pylabtools import select_figure_formats
from IPython.utils.capture import capture_output


def main(notebook: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))  # the folder of the notebook
    shell = InteractiveShell.instance()
    select_figure_formats(shell, {"png"})  # as a kernel has it
    printed, shown = "", list[dict[str, object]]()
    shell.displayhook.write_format_data = lambda data, *_: shown.append(data)
    for cell in nbformat.read(notebook, 4).cells:
        if cell.cell_type == "code":
            with capture_output() as captured:
                done = shell.run_cell(cell.source)
            done.raise_error()
            printed += captured.stdout
    print(json.dumps({"printed": printed, "pictures": sum("image/png" in data for data in shown)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
