"""Recipes on disk: TOML, and the metadata of an adapter."""

from pathlib import Path

import pytest

from loralens import FormatError, LoraLensError
from loralens.core import Strength
from loralens.core.stored import Ingredient, Recipe
from loralens.formats.records.results import read_recipe
from tests.formats.blobs import limits

TOML = """
method = "sum"
options = { lam = 0.5 }
take = "task"
truncate = { rank = 16 }

[[adapters]]
path = "task"
weight = 0.7
modules = { "v_proj" = 0.3 }

[[adapters]]
path = "org/other"
"""


def test_toml_is_read_and_paths_beside_it_are_found(tmp_path: Path) -> None:
    (tmp_path / "task").mkdir()
    file = tmp_path / "recipe.toml"
    file.write_text(TOML)
    here = str(tmp_path / "task")
    assert read_recipe(file) == Recipe(
        (Ingredient(here, Strength(0.7, {"v_proj": 0.3})), Ingredient("org/other")),
        options={"lam": 0.5},
        take=here,
        truncate={"rank": 16},
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.toml", "method = ", "not TOML"),
        ("deep.toml", "method = " + "[" * 100_000, "not TOML"),
        ("no.toml", "method = 'sum'", "no adapters"),
        ("gone.toml", None, "cannot be opened"),
        ("gone", None, "gone: "),
    ],
)
def test_what_is_no_recipe_names_the_file(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(LoraLensError, match=message) as caught:
        read_recipe(tmp_path / name)
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a." * 30 + "b = 1", "a name of more than 30 parts"),
        ("[" + "a." * 100_000 + "b]", "a name of more than 30 parts"),
        ("x" * 10_000 + " = 1", "an unknown field 'xxx"),
        ("method = 'sum' " + "#" * 1_000_000, "too many for a recipe"),
    ],
    ids=lambda text: text[:20],
)
def test_numbers_and_names_without_end(text: str, message: str, tmp_path: Path) -> None:
    """tomllib takes the square of the parts of a name: 16 s for 100 names of 4,000."""
    file = tmp_path / "r.toml"
    file.write_text(f'{text}\nadapters = [{{ path = "a" }}]\n')
    with limits(10, 64 << 20), pytest.raises(FormatError, match=message) as error:
        read_recipe(file)
    assert len(str(error.value)) < 1000


def test_a_path_that_is_too_long_for_the_system_is_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    file.write_text(f'adapters = [{{ path = "{"x" * 5000}" }}]\n')
    assert read_recipe(file).adapters[0].path == "x" * 5000
