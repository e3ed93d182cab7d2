"""Mutant: one mistake in one function, found by what the function says and not by where it stands."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loralens"


@final
@dataclass(frozen=True, slots=True)
class Mutant:
    """A mistake.

    Attributes
    ----------
    function : str
        The function it is made in: ``phi_map``, or ``Rounding.draws`` of a class; or the constant of a module, as the
        columns of tables are. Files move, so none is named.
    before, after : str
        A part of its source, which must stand there once, and what takes its place.
    test : str
        The test file of which at least one test must fail.
    """

    function: str
    before: str
    after: str
    test: str

    @property
    def label(self) -> str:
        """One line for people."""
        return f"{self.function}: {' '.join(self.before.split())} → {' '.join(self.after.split())}"


@cache
def functions() -> dict[str, list[tuple[Path, int, int]]]:
    """Name of a function or a constant of the package → where it stands: file, first byte, end."""
    found: dict[str, list[tuple[Path, int, int]]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_bytes()
        starts = [0]
        for line in source.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        for name, node in _named(ast.parse(source), ""):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            found.setdefault(name, []).append((path, begin, end))
    return found


def _named(tree: ast.AST, outer: str) -> Iterator[tuple[str, ast.stmt]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(tree, ast.Module) and isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((target.id, node) for target in targets if isinstance(target, ast.Name))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not isinstance(node, ast.ClassDef):
                yield outer + node.name, node
            yield from _named(node, f"{outer}{node.name}.")
        else:
            yield from _named(node, outer)


def mutated(mutant: Mutant) -> tuple[Path, bytes]:
    """The file of a mutant, and its bytes with the mistake.

    Raises
    ------
    LookupError
        The part of the source stands in no function or constant of this name, or more than once.
    """
    places = []
    for path, begin, end in functions().get(mutant.function, []):
        source = path.read_bytes()
        body = source[begin:end]
        places += [(path, source, begin, end)] * body.count(mutant.before.encode())
    if len(places) != 1:
        times = "not" if not places else f"{len(places)} times"
        raise LookupError(f"{mutant.before!r} stands {times} in {mutant.function}")
    path, source, begin, end = places[0]
    changed = source[begin:end].replace(mutant.before.encode(), mutant.after.encode())
    return path, source[:begin] + changed + source[end:]
