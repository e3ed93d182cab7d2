"""``loralens.similarity``: paths and objects, one, two and more; the result is what the command prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.tables import Tabular
from loralens.verbs.comparisons.pair_similarity import NestedSimilarity, PairSimilarity
from loralens.verbs.comparisons.similarity import CollectionSimilarity
from tests.cli.command import Command
from tests.draws import draw_adapter, draw_factors
from tests.verbs.shown import record_of

run = Command("similarity")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of two blocks with random factors, the last with one block alone."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("several")
    paths = [folder / name for name in "abcd"]
    for path in paths:
        blocks = range(1 if path.name == "d" else 2)
        names = [f"model.layers.{i}.self_attn.{kind}" for i in blocks for kind in ("q_proj", "v_proj")]
        loralens.save(draw_adapter(rng, dict.fromkeys(names, (12, 10))), path)
    return paths


@pytest.mark.some(4)
@pytest.mark.parametrize(("count", "kind"), [(1, NestedSimilarity), (2, PairSimilarity), (4, CollectionSimilarity)])
@pytest.mark.parametrize(
    "options", [{}, {"of": "B"}, {"side": "out", "phi_rank": 1, "phi": True}, {"modules": ["q_proj"]}]
)
def test_the_result_is_what_the_command_prints(
    several: list[Path], count: int, kind: type[Tabular], options: dict[str, Any]
) -> None:
    result = loralens.similarity(*map(str, several[:count]), **options)
    assert isinstance(result, kind)
    assert "\n" not in repr(result)
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", *([] if value is True else value if name == "modules" else [value]))
    ]
    assert record_of(result) == run.told(*several[:count], *words)
    assert run.good(*several[:count], *words, "--csv").stdout == result.to_csv()


def test_objects_are_compared_as_their_files_are(several: list[Path]) -> None:
    loaded = [loralens.load(path) for path in several]
    for count in (1, 2, 4):
        of_paths, of_objects = (record_of(loralens.similarity(*some[:count])) for some in (several, loaded))
        assert of_objects == of_paths
    assert loralens.similarity(loaded).adapters == tuple(map(str, several))
    mixed = loralens.similarity(several[0], loaded[1])
    assert mixed.adapters == (str(several[0]), str(several[1]))


@pytest.mark.parametrize("options", [{}, {"of": "A"}, {"of": "B", "phi_rank": 1}])
def test_every_pair_of_many_is_what_the_two_alone_are(several: list[Path], options: dict[str, Any]) -> None:
    pairs = record_of(loralens.similarity(several, phi=True, **options))["pairs"]
    assert len(pairs) == 6
    for pair in pairs:
        two = (several[pair["first"]], several[pair["second"]])
        assert pair["modules"] == record_of(loralens.similarity(*two, phi=True, **options))["modules"]


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(loralens.OptionError, match="no adapter is given"):
        loralens.similarity()


KEPT = Path("examples/adapters")
ONE_SEED = ("20newsgroups-r8-seed0", "reuters-r8-r8-seed0")


def test_the_side_is_out_unless_the_factor_or_the_user_says_otherwise(several):
    sides = {of: loralens.similarity(*several[:2], of=of).side for of in ("update", "A", "B")}
    assert sides == {"update": "out", "A": "in", "B": "out"}
    for count in (1, 2, 3):
        assert loralens.similarity(*several[:count]).record()["side"] == "out"
        assert loralens.similarity(*several[:count], side="in").record()["side"] == "in"


def test_a_shared_start_is_a_warning_only_to_whoever_looks_at_the_in_side(caplog):
    pair = [KEPT / name for name in ONE_SEED]
    with caplog.at_level("WARNING", logger="loralens"):
        out = loralens.similarity(*pair)
        assert not caplog.records
        loralens.similarity(*pair, side="in")
        assert any("the seed, not the task" in record.getMessage() for record in caplog.records)
    assert any("the in side would show that" in sentence for sentence in out.sentences())


@pytest.mark.parametrize(
    ("factor", "noise", "words"),
    [
        (1.0, 0.0, "practically the same adapter"),
        (1.0, 0.06, "practically the same adapter"),
        (3.0, 0.0, "3 times as strong"),
        (-1.0, 0.0, "practically opposites"),
        (-1.0, 1.0, "conflict"),
        (0.0, 1.0, "no more alike than two random updates"),
    ],
)
def test_the_conclusion_says_the_strongest_fact(factor, noise, words):
    rng = np.random.default_rng(3)
    first = draw_adapter(rng, {f"m{i}": (60, 50) for i in range(3)}, 4, dtype="f8")
    random = {name: rng.standard_normal((60, 50)) for name in first}
    dense = {name: module.B @ module.A for name, module in first.items()}
    scale = {name: np.linalg.norm(dense[name]) / np.linalg.norm(random[name]) for name in first}
    second = {
        name: loralens.LowRank(factor * dense[name] + noise * scale[name] * random[name], np.eye(50)) for name in first
    }
    other = loralens.Adapter(modules=second)
    result = loralens.similarity(first, other)
    assert words in " ".join(result.conclusion())
    one, two = (
        np.concatenate([np.asarray(x).ravel() for x in ms.values()])
        for ms in (dense, {n: m.B for n, m in second.items()})
    )
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two) if two.any() else 0.0
    assert f"cosine {cosine:+.3f}".replace("-", "−") in result.conclusion()[0]
    collection = loralens.similarity(first, other, first)
    assert "practically the same adapter" in collection.conclusion()[0]


def test_the_overlap_of_unequal_ranks_is_said_of_the_fewer_directions() -> None:
    """φ divides by the lower rank, so it is no share of the directions of both."""
    rng = np.random.default_rng(0)

    def adapter(*ranks: int) -> loralens.Adapter:
        pairs = (loralens.LowRank(*draw_factors(rng, 12, 10, rank)) for rank in ranks)
        return loralens.Adapter(modules={f"b.{i}.q_proj": pair for i, pair in enumerate(pairs)})

    def said(first: loralens.Adapter, second: loralens.Adapter) -> str:
        return str(loralens.similarity(first, second).conclusion()[1])

    low, high, mixed = adapter(2, 2), adapter(5, 2), adapter(1, 3)
    assert "they share" in said(low, adapter(2, 2))
    assert "% of the directions of adapter 1 lie within those of adapter 2, where chance" in said(low, high)
    assert "% of the directions of adapter 2 lie within those of adapter 1, where chance" in said(high, low)
    assert "% of the directions of the lower rank lie within those of the higher one" in said(low, mixed)
