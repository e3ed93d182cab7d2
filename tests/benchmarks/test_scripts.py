"""The programs that benchmarks run in processes of their own are strings, which no type checker reads."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
IMPORT = re.compile(r"^\s*from (loralens[\w.]*) import ([\w, ]+)$", re.MULTILINE)


def imports(file: Path) -> list[tuple[str, str]]:
    """Module and name of every import of the project in the strings of a file."""
    strings = [node.value for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.Constant)]
    found = [match for text in strings if isinstance(text, str) for match in IMPORT.findall(text)]
    return [(module, name.split(" as ")[0].strip()) for module, names in found for name in names.split(",")]


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: str(file.relative_to(FOLDER)))
def test_what_the_programs_of_benchmarks_import_is_there(file: Path) -> None:
    for module, name in imports(file):
        assert hasattr(import_module(module), name), f"{file.name}: from {module} import {name}"


def test_the_test_above_reads_the_programs() -> None:
    assert ("loralens.arithmetic.combine", "combine_adapters") in imports(FOLDER / "combine.py")
