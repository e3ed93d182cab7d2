"""Reading recipes: from a TOML file that a user wrote, or from the metadata of an adapter that was combined.

```toml
method = "ties"
options = { density = 0.2 }
truncate = { rank = 16 }

[[adapters]]
path = "task-a"
weight = 0.7
modules = { "v_proj" = 0.3 }
```

Paths in a TOML file are relative to its folder; those in metadata are as the user gave them. Unlike other names that
come from files, these paths may lead anywhere, like the arguments of a command. They are only read, and the user of a
recipe chooses where the output goes.
"""

import os
import re
from dataclasses import replace
from pathlib import Path

from loralens.core.stored import Recipe, parse_json
from loralens.errors import FormatError, place
from loralens.formats.files.container import OpenFile, Stored, read_safetensors
from loralens.formats.files.json_text import json_text
from loralens.formats.files.location import adapter_file

KEY = "loralens_recipe"  # the key of the recipe in the metadata
LONGEST = 1_000_000  # bytes of a TOML file; a recipe of a thousand adapters takes less
DEEPEST = 30  # parts of a dotted key: the time of tomllib grows with their square, and a recipe needs three
_DEEP = re.compile(rf"""(?<![\w.-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{DEEPEST}}}""")


def read_recipe(path: Path) -> Recipe:
    """Read the recipe in a TOML file, or in the metadata of the adapter at ``path``.

    Raises
    ------
    FormatError
        The file is not TOML, or the file or adapter contains no recipe.
    """
    with place(path):
        if path.suffix == ".toml":
            return _from_toml(path)
        file = adapter_file(path)
        # Only safetensors files have metadata that a recipe is written to.
        if file.suffix != ".safetensors":
            raise FormatError("holds no recipe", fix="give a .toml file, or an adapter that loralens combined")
        text = (read_safetensors(file).metadata or {}).get(KEY)
        if text is None:
            raise FormatError("was not combined by loralens: no recipe is in it", fix="give a .toml file")
        try:
            content = parse_json(text)
        except ValueError as error:
            raise FormatError("its recipe is not readable", fix="write one as a .toml file") from error
        return _recipe(content)


def _from_toml(path: Path) -> Recipe:
    try:
        file = OpenFile(path)  # it does not wait for a pipe, and refuses a folder
        if file.size > LONGEST:
            raise FormatError(f"{file.size:,} bytes are too many for a recipe", fix="give the path of a recipe")
        text = file.read(0, file.size).decode("utf-8")
        # This is checked before tomllib sees the text.
        if _DEEP.search(text):
            raise FormatError(f"has a name of more than {DEEPEST} parts", fix="give the path of a recipe")
        import tomllib  # few recipes are read from files of their own

        content = tomllib.loads(text)
    # TOMLDecodeError is a ValueError. A number of too many digits raises a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is not TOML: {error}", fix="mend the file") from error
    recipe = _recipe(content)

    def resolve(name: str) -> str:
        # Path.exists raises an error for a path that is too long for the system.
        return str(path.parent / name) if os.path.exists(path.parent / name) else name  # noqa: PTH110

    take = recipe.take if recipe.take in (None, "none") else resolve(str(recipe.take))
    adapters = tuple(replace(member, path=resolve(member.path)) for member in recipe.adapters)
    return replace(recipe, adapters=adapters, take=take)


def _recipe(content: object) -> Recipe:
    # JSON may be a list or a number.
    if not isinstance(content, dict):
        raise FormatError("its recipe is not a table", fix="write one as a .toml file")
    return Recipe.of(content)


def stamp_recipe(stored: Stored, recipe: Recipe) -> Stored:
    """Add the recipe to the metadata of ``stored``."""
    text = json_text(recipe.record())
    return replace(stored, metadata={**(stored.metadata or {}), KEY: text})
