"""The axes of a grid: what they mean, what they are called, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from loralens import OptionError
from loralens.verbs.runs.grid_axes import GridPoint, grid_points


def values(grid: Any) -> list[dict[str, Any]]:
    return [dict(point.values) for point in grid_points(grid, ())]


def names(grid: Any) -> list[str]:
    return [point.name for point in grid_points(grid, ())]


def test_the_last_axis_varies_fastest() -> None:
    assert values(["rank=1,8", "seed=0..2"]) == [
        {"rank": rank, "seed": seed} for rank in (1, 8) for seed in (0, 1, 2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "option", "wanted"),
    [
        ("rank=1,8,64", "rank", [1, 8, 64]),
        ("seed=0..4", "seed", [0, 1, 2, 3, 4]),
        ("seed=7,0..1", "seed", [7, 0, 1]),
        ("lr=1e-4, 3e-4", "lr", [1e-4, 3e-4]),
        ("alpha=8..10", "alpha", [8.0, 9.0, 10.0]),
        ("targets=all-linear,q_proj+v_proj", "targets", [("all-linear",), ("q_proj", "v_proj")]),
        ("exclude=none,o_proj", "exclude", [(), ("o_proj",)]),
        ("rank-pattern=none,down_proj=4+up_proj=2", "rank_pattern", [(), ("down_proj=4", "up_proj=2")]),
        ("pack=true,False", "pack", [True, False]),
        ("magnitude=none,true", "magnitude", [None, True]),
        ("patience=none,3", "patience", [None, 3]),
        ("steps=10", "steps", [10]),
        ("method=lora,dora", "method", ["lora", "dora"]),
        ("data=a.jsonl,b.jsonl", "data", ["a.jsonl", "b.jsonl"]),
        ("--rank=2", "rank", [2]),
    ],
)
def test_a_text_is_what_the_type_of_its_option_says(text: str, option: str, wanted: list[Any]) -> None:
    found = [value[option] for value in values(text)]
    assert found == wanted
    assert [type(value) for value in found] == [type(value) for value in wanted]


def test_python_says_the_same_as_texts() -> None:
    import numpy as np

    texts = grid_points(["rank=1,8", "targets=all-linear,q_proj+v_proj", "lr=0.001", "pack=true"], ())
    mapping = {
        "rank": np.array([1, 8]),
        "targets": ["all-linear", ["q_proj", "v_proj"]],
        "lr": 1e-3,
        "pack": [True],
    }
    assert grid_points(mapping, ()) == texts
    assert (
        grid_points({"rank": "1,8", "targets": "all-linear,q_proj+v_proj", "lr": "0.001", "pack": "true"}, ()) == texts
    )
    assert grid_points({**mapping, "targets": ["all-linear", "q_proj,v_proj"]}, ()) == texts
    assert type(grid_points(mapping, ())[0].values["rank"]) is int


def test_several_mappings_are_several_grids_and_equal_runs_come_once() -> None:
    found = grid_points([{"rank": [1, 2], "seed": 0}, {"seed": range(2), "rank": 2}], ())
    assert found == [
        GridPoint("rank=1_seed=0", {"rank": 1, "seed": 0}),
        GridPoint("rank=2_seed=0", {"rank": 2, "seed": 0}),
        GridPoint("rank=2_seed=1", {"seed": 1, "rank": 2}),
    ]


def test_names_are_names_of_folders_on_every_system() -> None:
    assert names({"targets": [["*.q_proj", "v_proj"]]})[0].startswith("targets=-.q_proj+v_proj-")
    assert names({"targets": ["*_proj"]}) != names({"targets": ["?_proj"]})
    assert names({"data": ["texts/news.jsonl", Path("more/other.txt")]}) == ["data=news.jsonl", "data=other.txt"]
    long = names({"data": "x" * 300 + ".jsonl"})[0]
    assert len(long) < 100
    assert long != names({"data": "x" * 301 + ".jsonl"})[0]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("rnk=1", r"train has no option 'rnk'\n  fix: nearest: rank"),
        ({"learning-rate": 1}, "train has no option 'learning-rate'\n  fix: nearest: "),
        ("output=a,b", "output concerns the grid as a whole"),
        ("resume=true", "resume concerns the grid as a whole"),
        ("threads=1,2", "threads concerns the grid as a whole"),
        ("rank", r"grid='rank' is not OPTION=VALUES\n  fix: write grid='rank=1,8'"),
        (["rank=1", "rank=2"], "has the axis rank twice"),
        ("rank=a", r"rank: 'a' is not a whole number\n  fix: write rank=1,8"),
        ("rank=1.5", "rank: '1.5' is not a whole number"),
        ("rank=none", "rank: 'none' is not a whole number"),
        ("lr=fast", "lr: 'fast' is not a number"),
        ("pack=yes", "pack: 'yes' is not true or false"),
        ("rank=1,,2", "a value is empty"),
        ("rank=", "a value is empty"),
        ("rank=8..1", "8..1 is not a range"),
        ("seed=0..100000", "0..100000 is not a range"),
        (["seed=0..999", "rank=1,2,3,4,5,6,7,8,9,10,11"], "the grid has 11,000 runs"),
        ({"rank": []}, "the axis rank of the grid has no values"),
        ([{"rank": 1}, "seed=1"], "the grid has texts and mappings"),
        ([3], "3 is not a grid"),
        ({"data": ["a/t.txt", "b/t.txt"]}, "two runs of the grid have the name data=t.txt"),
    ],
)
def test_what_is_no_grid_is_refused(grid: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        grid_points(grid, ())


def test_an_option_is_given_for_all_runs_or_is_an_axis() -> None:
    with pytest.raises(OptionError, match="rank= is given for all runs and as an axis"):
        grid_points("rank=1,2", {"rank", "lr"})
