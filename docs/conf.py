"""How sphinx builds these pages: ``make docs``."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

from usage import MARK, usage

from loralens import __version__

project, author, release = "loralens", "the loralens authors", __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"loralens {release}"

myst_heading_anchors = 3

autosummary_generate = True
autodoc_default_options = {"members": True, "show-inheritance": False}
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types in words
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_use_param = False
default_role = "code"  # `name` in a docstring is code, whether or not it has a page
nitpicky = True
nitpick_ignore_regex = [("py:class", ".*")]  # the types of attributes are words too: "float64 array, shape (k,)"


def _bars(*event: object) -> None:
    """|x| is a number in our docstrings, and a substitution in reStructuredText."""
    lines: list[str] = event[-1]  # type: ignore[assignment]
    # A command to copy is a line of its own.
    lines[:] = [re.sub(r"(``.*?``)|\|", lambda bar: bar[1] or r"\|", line) for line in lines]
    lines[:] = [re.sub(r"^\$ (.*)", r"| ``\1``", line) for line in lines]


def _usage(*event: object) -> None:
    """The pages of commands get the options of today."""
    name, content = event[-2:]
    folder, _, page = str(name).partition("/")
    if folder == "commands":
        content[0] = content[0].replace(MARK, usage(page))  # type: ignore[index]


def setup(app: object) -> None:
    """What sphinx calls."""
    app.connect("source-read", _usage)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", _bars)  # type: ignore[attr-defined]
