"""Recipe: what is written down is what is read again, and nothing else."""

import json

import pytest

from loralens import FormatError
from loralens.core import Strength
from loralens.core.stored import Ingredient, Recipe

FULL = Recipe(
    (Ingredient("a", Strength(0.5)), Ingredient("b", Strength(1.0, {"*.0.*": 2.0, "q_proj": -1}))),
    method="ties",
    options={"density": 0.2},
    space="full",
    seed=3,
    modules=("q_proj",),
    take="a",
    drop_dead=True,
    truncate={"rank": 4},
    uniform=True,
)


@pytest.mark.parametrize("recipe", [FULL, Recipe((Ingredient("a"),))])
def test_a_recipe_round_trips_through_json(recipe):
    assert Recipe.of(json.loads(json.dumps(recipe.record()))) == recipe


def test_defaults_are_not_written_down():
    assert Recipe((Ingredient("a"),)).record() == {"method": "sum", "adapters": [{"path": "a", "weight": 1.0}]}


def test_the_last_glob_that_matches_counts():
    strength = Strength(0.5, {"*": 2.0, "v_proj": 3.0, "m.[1].v_proj": 4.0})
    assert strength.of("m.0.v_proj") == 3.0
    assert strength.of("m.0.q_proj") == 2.0
    assert strength.of("m.[1].v_proj") == 4.0  # brackets are literal
    assert Strength(0.5, {"x": 1.0}).of("m.0.q_proj") == 0.5


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({}, "no adapters"),
        ({"adapters": ["a"]}, "not a table"),
        ({"adapters": [{"weight": 1}]}, "no path"),
        ({"adapters": [{"path": "a", "weight": "much"}]}, "numbers"),
        ({"adapters": [{"path": "a", "weigth": 1}]}, "'weigth'"),
        ({"adapters": [{"path": "a"}], "methode": "sum"}, "'methode'"),
        ({"adapters": [{"path": "a"}], "seed": "1"}, "seed"),
        ({"adapters": [{"path": "a"}], "modules": ["q_proj", 3]}, "modules"),
        ({"adapters": [{"path": "a"}], "seed": -1}, "seed is -1"),
        ({"adapters": [{"path": "a", "weight": float("nan")}]}, "a: adapters: weight is not a finite"),
        ({"adapters": [{"path": "a"}], "options": {"lam": 10**400}}, "options: lam is not a finite"),
        ({"adapters": [{"path": "a"}], "truncate": {"rank": float("inf")}}, "truncate: rank is not a finite"),
        ({"adapters": [{"path": "a"}], "truncate": {"error": 0.1, "energy": 0.5}}, "truncate has 2 rules"),
    ],
)
def test_what_is_no_recipe_says_what_is_wrong(said, message):
    with pytest.raises(FormatError, match=message):
        Recipe.of(said)
