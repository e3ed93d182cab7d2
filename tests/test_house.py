"""House rules that are tests: what is imported when, what is public, what is documented."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loralens
from loralens.cli.main import COMMANDS

PACKAGE = Path(loralens.__file__).parent
HEAVY = ("torch", "scipy", "matplotlib", "rich", "transformers", "safetensors", "peft")


def imported(*arguments: str) -> set[str]:
    """Modules that a command has imported when it ends."""
    code = (
        "import sys, io, contextlib\n"
        "from loralens.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(sys.argv[1:], standalone_mode=False)\n"
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_nothing_heavy_not_even_numpy(arguments: list[str]) -> None:
    assert not imported(*arguments) & {*HEAVY, "numpy", "ml_dtypes"}


@pytest.mark.parametrize("command", [["spectrum", "--json"], ["spectrum"], ["inspect"]])
def test_the_path_of_spectrum_and_inspect_is_light(command: list[str], small: Path) -> None:
    modules = imported(*command, str(small))
    assert "numpy" in modules
    assert not modules & set(HEAVY)


def test_public_names_are_sorted_and_there() -> None:
    assert loralens.__all__ == sorted(loralens.__all__)
    for name in loralens.__all__:
        assert getattr(loralens, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = loralens.nonsense


def test_packages_are_imported_when_they_are_first_used() -> None:
    code = (
        "import sys, loralens\n"
        "before = set(sys.modules)\n"
        "assert callable(getattr(loralens.training, '__getattr__'))\n"
        "print(*(name for name in before if name.startswith('loralens.')), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["loralens.version", "False"]


def test_every_package_but_the_commands_is_there_by_its_name() -> None:
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")} - {"cli"}
    assert set(dir(loralens)) == packages | set(loralens.__all__)
    assert all(getattr(loralens, name).__name__ == f"loralens.{name}" for name in packages)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 400, "over 400 lines: find the second noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            doc = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)  # type: ignore[operator]
            assert lines <= 60, f"{node.name}: {lines} lines"


def test_tables_that_keep_numpy_out_of_help_agree_with_those_they_stand_for() -> None:
    from loralens.analysis.clients import rules as consumers
    from loralens.cli import convert, inspect
    from loralens.formats import FORMATS

    assert set(convert.TARGETS) == {form.name for form in FORMATS if form.writer}
    assert set(inspect.CONSUMERS) == set(consumers.CONSUMERS)


def test_python_minus_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "loralens", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"loralens, version {loralens.__version__}\n"
