"""Paste the rooms of the house, one row a file from its docstring's first line, into ARCHITECTURE.md.

python docs/rooms.py writes it; with --check it exits 1 where the table is no longer true.
"""

import ast
import re
import sys
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "ARCHITECTURE.md"
BLOCK = re.compile(r"<!-- rooms -->\n.*?<!-- /rooms -->", re.DOTALL)

# Rooms from the ground floor up, and what each is for.
ROOMS = {
    "linalg": "arrays in, arrays out; no word of LoRA",
    "core": "an adapter, its modules, and what all verbs share",
    "formats": "what touches the disk",
    "analysis": "questions and their answers as frozen data",
    "compression": "smaller adapters, and what the smaller size cost",
    "arithmetic": "several adapters as one",
    "merging": "into the base and back",
    "training": "adapters made",
    "charts": "results drawn, never shown",
    "reporting": "everything on one page",
    "cli": "one file a command, and what several commands share",
}


def rooms() -> str:
    """The block: a heading and a table for every room."""
    parts = ["<!-- rooms -->\n"]
    found = {path.name for path in (ROOT / "loralens").iterdir() if (path / "__init__.py").is_file()}
    if found != set(ROOMS):
        raise click.ClickException(f"docs/rooms.py and loralens/ disagree: {', '.join(sorted(found ^ set(ROOMS)))}")
    for room, text in ROOMS.items():
        parts += [f"### {room}: {text}\n", "| file | noun |\n| --- | --- |"]
        files = sorted((ROOT / "loralens" / room).rglob("*.py"), key=lambda path: (path.parent != ROOT, str(path)))
        parts += [f"| `{path.relative_to(ROOT / 'loralens')}` | {noun(path)} |" for path in files if noun(path)]
        parts.append("")
    return "\n".join(parts) + "\n<!-- /rooms -->"


def noun(path: Path) -> str:
    """The first sentence of a file's docstring; nothing of a package that only holds others."""
    if path.name == "__init__.py" and path.stat().st_size < 200:
        return ""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(said.split("\n\n")[0].split()).removesuffix(".").replace("|", "\\|")


def run(*, check: bool) -> int:
    """Write the rooms, or say that they are not as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    if len(BLOCK.findall(text)) != 1:
        raise click.ClickException("ARCHITECTURE.md needs one <!-- rooms --> and one <!-- /rooms --> behind it")
    fresh = BLOCK.sub(lambda _: rooms(), text)
    if check and fresh != text:
        click.echo("stale: ARCHITECTURE.md\n  fix: python docs/rooms.py", err=True)
        return 1
    if fresh != text:
        PAGE.write_text(fresh, encoding="utf-8")
        click.echo("wrote: ARCHITECTURE.md")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(run(check="--check" in sys.argv[1:]))
    except click.ClickException as error:
        error.show()
        sys.exit(1)
