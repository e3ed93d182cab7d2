"""Families of image and video models from Qwen-Image to Chroma: their layers, and the names that clients map.

The table is ``image_families.json``; ``tests/live/make_image_families.py`` makes it by running diffusers and ComfyUI.
A name in it has ``#`` for the number of its block.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple, final

from loralens.core.names import inner_form

Client = Literal["comfyui", "diffusers"]
Leaf = Literal["lora_A", "lora_down"]
_NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


class Row(NamedTuple):
    """Layers of one kind: names in diffusers and in the native checkpoint, and sizes by the name of a model.

    A size is a list of (first block, block behind the last, out, in, kernel …). Layers of one native name are rows of
    one matrix, in the order of the table. ``swapped`` says that the native checkpoint has the other half of rows first.
    """

    name: str
    native: str
    swapped: int
    sizes: Mapping[str, list[list[int]]]


@final
@dataclass(frozen=True)
class Family:
    """One family of the table.

    Attributes
    ----------
    name : str
    words : list of str
        Words in the name of a base model, in lower case, that mean this family.
    layers : list of Row
    clients : dict
        Client → naming scheme, followed for diffusers by the leaf of the tensors → numbers of the rows that the client
        does not map in that scheme. A scheme that is missing is not mapped at all.
    """

    name: str
    words: list[str]
    layers: list[Row]
    clients: Mapping[str, Mapping[str, list[int]]]

    def rows_named(self, name: str) -> tuple[list[Row], str]:
        """The rows of the layers that a module adapts, whatever its prefix and its joints are, and its block number."""
        spellings = _by_spelling()
        for each, number in _indexed(inner_form(name)):
            rows = spellings.get(each, {}).get(self.name)
            if rows:
                return rows, number
        return [], ""

    def lacks(self, client: Client, scheme: str) -> set[str]:
        """The layers, by their names in diffusers, that a client does not map in a naming scheme."""
        every = range(len(self.layers))
        return {self.layers[i].name for i in self.clients[client].get(scheme, every)}

    @property
    def sizes(self) -> list[str]:
        """The models of the family whose shapes are in the table."""
        return list(dict.fromkeys(size for row in self.layers for size in row.sizes))


@cache
def _table() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(files("loralens.core").joinpath("image_families.json").read_text("utf-8"))
    return table


def client_versions() -> Mapping[str, str]:
    """Client → the version whose rules are in the table."""
    versions: Mapping[str, str] = _table()["versions"]
    return versions


@cache
def families() -> Mapping[str, Family]:
    """Name → family."""
    return {
        name: Family(name, entry["words"], [Row(*row) for row in entry["layers"]], entry["clients"])
        for name, entry in _table()["families"].items()
    }


@cache
def _by_spelling() -> Mapping[str, Mapping[str, list[Row]]]:
    """Name with # and underscores → family → rows: one by the name in diffusers, all of a matrix by its native name."""
    found: dict[str, dict[str, list[Row]]] = {}
    for family in families().values():
        for spelled in ("native", "name"):
            groups: dict[str, list[Row]] = {}
            for row in family.layers:
                groups.setdefault(getattr(row, spelled).replace(".", "_"), []).append(row)
            for key, rows in groups.items():
                found.setdefault(key, {})[family.name] = rows
    return found


def _indexed(name: str) -> Iterator[tuple[str, str]]:
    """A name, and the name with # for each of its numbers, with that number."""
    yield name, ""
    for number in _NUMBER.finditer(name):
        yield f"{name[: number.start()]}#{name[number.end() :]}", number[0]


def families_of(names: Collection[str]) -> list[Family]:
    """The families that have layers of all these names, in any dialect."""
    spellings = _by_spelling()
    left = set(families()) if names else set()
    for name in names:
        left &= {family for each, _ in _indexed(inner_form(name)) for family in spellings.get(each, ())}
        if not left:
            break
    return [family for name, family in families().items() if name in left]


def are_stated(words: str) -> bool:
    """Whether words about a base model, in lower case, name a family."""
    return any(word in words for family in families().values() for word in family.words)


def names_mapped(client: Client, family: str, names: Iterable[str], leaf: Leaf = "lora_A") -> dict[str, bool]:
    """Which names of modules a client maps to layers of a family of models.

    Parameters
    ----------
    client : {"comfyui", "diffusers"}
        ComfyUI's ``model_lora_keys_unet``, or the ``lora_state_dict`` of the pipelines of diffusers, in the versions of
        `client_versions`.
    family : str
        A key of `families`, such as ``"Qwen-Image"``.
    names : iterable of str
        Names of modules as their file has them: with their prefix, and without ``.lora_A.weight`` and the like.
    leaf : {"lora_A", "lora_down"}
        The half that stands behind the names in the file. It matters to diffusers only.

    Returns
    -------
    dict of str to bool
        Name → whether the client maps it. A client passes over other names, or refuses the whole file.
    """
    entry = families()[family]
    known = set()
    for scheme, missing in entry.clients[client].items():
        spelling, _, leaf_of_scheme = scheme.partition(" ")
        # Schemes that diffusers takes only with all layers of a stack are not promised.
        if client == "diffusers" and leaf_of_scheme != leaf:
            continue
        flat = spelling.endswith("_")
        stem = spelling.rstrip("_")
        for number, row in enumerate(entry.layers):
            if number not in missing:
                name = row.native if stem.endswith("N") else row.name
                known.add(stem[:-1] + (name.replace(".", "_") if flat else name))
    return {name: any(each in known for each, _ in _indexed(name)) for name in names}
