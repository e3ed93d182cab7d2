"""House rules that are tests: what is imported when, what is public, what is documented."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import loralens

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


@pytest.mark.parametrize("words", [["--help"], ["spectrum", "--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy_not_even_numpy(words: list[str]) -> None:
    assert not imported(*words) & {*HEAVY, "numpy", "ml_dtypes"}


@pytest.mark.slow
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


# The operators of an adapter (a + b) stand on what sums adapters up, which stands on the adapter.
CYCLES = [{"loralens.core.adapter", "loralens.core.together"}]


@pytest.mark.slow
def test_no_import_cycle_but_the_recorded_one() -> None:
    assert [component for component in components(imports()) if len(component) > 1] == CYCLES


def imports() -> dict[str, set[str]]:
    """Every module of the package → the modules that it imports when it runs, within functions too."""
    names = {".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file for file in sources()}
    names = {name.removesuffix(".__init__"): file for name, file in names.items()}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        graph[name] = {
            target if target in names else str(node.module)
            for node in statements(tree_of(file), for_checkers=False)
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("loralens")
            for target in (f"{node.module}.{alias.name}" for alias in node.names)
        } - {name}
    return graph


def statements(node: ast.AST, *, for_checkers: bool = True) -> Iterator[ast.AST]:
    """Every statement below, which are much fewer than all nodes; also those for type checkers alone, if asked for."""
    for part in ("body", "orelse", "finalbody", "handlers", "cases"):
        for one in getattr(node, part, ()):
            if for_checkers or not (isinstance(one, ast.If) and "TYPE_CHECKING" in ast.unparse(one.test)):
                yield one
                yield from statements(one, for_checkers=for_checkers)


def components(graph: dict[str, set[str]]) -> list[set[str]]:
    """Modules that import each other, directly or through others."""
    reach = {name: reachable(graph, name) for name in graph}
    groups = {frozenset({name} | {other for other in reach[name] if name in reach[other]}) for name in graph}
    return sorted(map(set, groups), key=sorted)


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    pending = [*graph.get(start, ())]
    while pending:
        name = pending.pop()
        if name not in seen:
            seen.add(name)
            pending += graph.get(name, ())
    return seen


ROOMS = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))


# What these rooms make reaches users through the verbs.
INNER = ("charts", "cli", "fleet", "reporting", "serving", "verbs")


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in INNER])
def test_a_package_lists_what_is_public_and_no_module_shadows_it(room: str) -> None:
    package = getattr(loralens, room)
    assert dir(package) == sorted(package.__all__)
    for name in package.__all__:
        assert getattr(package, name) is not None
    assert not {path.stem for path in (PACKAGE / room).iterdir()} & set(package.__all__)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


# Files of the system, and files that this program has just written itself. The index of a fleet has its own checks.
OPENS = {
    "cli/demo.py",
    "cli/derive.py",
    "cli/terminal.py",
    "exports.py",
    "core/image_families.py",  # a table of the package
    "core/memory.py",
    "formats/files/atomic.py",
    "formats/files/disk.py",
    "formats/files/outside.py",
    "verbs/served/predictions.py",  # a text of the package
}


def test_files_from_outside_are_opened_by_one_function() -> None:
    """Any other way of opening waits for the writer of a pipe, or reads an endless device."""
    ways = (
        r"\.read_(?:text|bytes)\(",
        r"\.open\((?:\"rb?\"|encoding|\))",
        r"os\.open\(.*O_RDONLY",
        r"(?:\(|= |with )open\(",
    )
    opening = re.compile("|".join(ways))
    found = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        if "fleet" not in file.relative_to(PACKAGE).parts and opening.search(file.read_text(encoding="utf-8"))
    }
    assert found <= OPENS, "open it with loralens.formats.files.outside"


def test_tables_that_keep_numpy_out_of_help_agree_with_those_they_stand_for() -> None:
    from loralens.analysis.clients import CLIENTS
    from loralens.choices import TARGET_FORMATS, Consumer
    from loralens.formats import FORMATS

    assert set(TARGET_FORMATS) == {form.name for form in FORMATS if form.writer}
    assert get_args(Consumer) == tuple(CLIENTS)


def test_json_from_outside_has_one_reader() -> None:
    """`parse_json`, which refuses values that are nested deeply; what was just written may be read by `json.loads`."""
    for file in sorted(PACKAGE.rglob("*.py")):
        calls = [node for node in ast.walk(tree_of(file)) if isinstance(node, ast.Call)]
        read = [call for call in calls if ast.unparse(call.func) in ("json.load", "json.loads")]
        outside = [call for call in read if not ast.unparse(call.args[0]).startswith("json.dumps(")]
        # The second one reads a table of the package.
        assert len(outside) == (file.name in ("stored.py", "image_families.py")), file


def test_python_minus_m_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "loralens", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"loralens, version {loralens.__version__}\n"
