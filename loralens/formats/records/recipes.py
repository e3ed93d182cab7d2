"""Recipes on disk: a TOML file that somebody wrote, or the metadata of an adapter that was combined.

```toml
method = "ties"
options = { density = 0.2 }
truncate = { rank = 16 }

[[adapters]]
path = "task-a"
weight = 0.7
modules = { "v_proj" = 0.3 }
```

Paths in a TOML file are relative to its folder; those in metadata are as they were given. Unlike other names that come
out of files they may lead anywhere, as the arguments of a command may: whoever follows a recipe reads the adapters that
it names. Nothing is written by such a name: the output goes where the user says.
"""

import json
import os
import re
import tomllib
from dataclasses import replace
from pathlib import Path

from loralens.core.recipe import Recipe
from loralens.errors import FormatError, place
from loralens.formats.files.container import OpenFile, Stored, json_text, read_safetensors
from loralens.formats.files.location import adapter_file

KEY = "loralens_recipe"  # of the metadata
LONGEST = 1_000_000  # bytes of a TOML file
DEEPEST = 30  # parts of a key with dots, whose square is what tomllib takes; a recipe needs three
_DEEP = re.compile(rf"""(?<![\w.-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{DEEPEST}}}""")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file, or in the metadata of the adapter at ``path``.

    Raises
    ------
    FormatError
        No TOML; no recipe in it; an adapter that has none.
    """
    with place(path):
        if path.suffix == ".toml":
            return _from_toml(path)
        file = adapter_file(path)
        if file.suffix != ".safetensors":
            raise FormatError("holds no recipe", fix="give a .toml file, or an adapter that loralens combined")
        text = (read_safetensors(file).metadata or {}).get(KEY)
        if text is None:
            raise FormatError("was not combined by loralens: no recipe is in it", fix="give a .toml file")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FormatError("its recipe is not readable", fix="write one as a .toml file") from error
        return _recipe(content)


def _from_toml(path: Path) -> Recipe:
    try:
        file = OpenFile(path)  # which neither waits for a pipe nor takes a folder
        if file.size > LONGEST:
            raise FormatError(f"{file.size:,} bytes are too many for a recipe", fix="give the path of a recipe")
        text = file.read(0, file.size).decode("utf-8")
        if _DEEP.search(text):
            raise FormatError(f"has a name of more than {DEEPEST} parts", fix="give the path of a recipe")
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError alone where a whole number has too many digits
        raise FormatError(f"is not TOML: {error}", fix="mend the file") from error
    recipe = _recipe(content)

    def resolve(name: str) -> str:
        # Not Path.exists, which raises where a path is longer than the system has any.
        return str(path.parent / name) if os.path.exists(path.parent / name) else name  # noqa: PTH110

    take = recipe.take if recipe.take in (None, "none") else resolve(str(recipe.take))
    adapters = tuple(replace(member, path=resolve(member.path)) for member in recipe.adapters)
    return replace(recipe, adapters=adapters, take=take)


def _recipe(content: object) -> Recipe:
    if not isinstance(content, dict):
        raise FormatError("its recipe is not a table", fix="write one as a .toml file")
    return Recipe.of(content)


def stamped(stored: Stored, recipe: Recipe) -> Stored:
    """``stored`` with the recipe in its metadata."""
    text = json_text(recipe.record())
    return replace(stored, metadata={**(stored.metadata or {}), KEY: text})
