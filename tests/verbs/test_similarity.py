"""``loralens.similarity``: paths and objects, one, two and more; the result is what the command prints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens.analysis import every_pair as every_pair
from loralens.analysis.two_adapters import compare_subspaces
from loralens.tables.result import Tabular
from loralens.verbs.comparisons.collection_similarity import CollectionSimilarity
from loralens.verbs.comparisons.pair_similarity import NestedSimilarity, PairSimilarity
from tests.cli.command import Command
from tests.verbs.shown import check_tables_fit, record_of, rows_of

run = Command("similarity")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four adapters of two blocks with random factors, the last with one block alone."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("several")
    paths = [folder / name for name in "abcd"]
    for path in paths:
        modules = {
            f"model.layers.{i}.self_attn.{kind}": loralens.LowRank(
                rng.standard_normal((12, 2)).astype(np.float32), rng.standard_normal((2, 10)).astype(np.float32)
            )
            for i in range(1 if path.name == "d" else 2)
            for kind in ("q_proj", "v_proj")
        }
        loralens.save(loralens.Adapter(modules=modules), path)
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
        assert of_objects.pop("adapters") == ["adapter 1", "adapter 2", "adapter 3", "adapter 4"][:count] or count == 1
        del of_paths["adapters"]
        assert of_objects == of_paths
    assert loralens.similarity(loaded).adapters == ("adapter 1", "adapter 2", "adapter 3", "adapter 4")
    mixed = loralens.similarity(several[0], loaded[1])
    assert mixed.adapters == (str(several[0]), "adapter 2")


def test_two_are_a_mapping_of_their_modules(several: list[Path]) -> None:
    first, second = map(loralens.load, several[:2])
    result, below = loralens.similarity(first, second), compare_subspaces(first, second)
    assert list(result) == list(below)
    assert (result.cosine, result.cosine_z) == (below.cosine, below.cosine_z)
    assert [similarity.cosine for _, similarity in result.items()] == [one.cosine for _, one in below.items()]
    assert result[QUERY].overlap.full == below[QUERY].overlap.full


def test_the_json_of_many_comes_in_pieces(several: list[Path]) -> None:
    result = loralens.similarity(several)
    pieces = list(result.json_pieces())
    assert len(pieces) == 2 + 6
    assert json.loads("".join(pieces)) == record_of(result)
    assert result.cosine[0, 1] == pytest.approx(loralens.similarity(*several[:2]).cosine)


@pytest.mark.parametrize("options", [{}, {"of": "A"}, {"of": "B", "phi_rank": 1}])
def test_every_pair_of_many_is_what_the_two_alone_are(several: list[Path], options: dict[str, Any]) -> None:
    pairs = record_of(loralens.similarity(several, phi=True, **options))["pairs"]
    assert len(pairs) == 6
    for pair in pairs:
        two = (several[pair["first"]], several[pair["second"]])
        assert pair["modules"] == record_of(loralens.similarity(*two, phi=True, **options))["modules"]


def test_limits_of_memory_change_no_number(several: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = record_of(loralens.similarity(several))
    monkeypatch.setattr(every_pair, "HELD", 1)
    assert record_of(loralens.similarity(several)) == expected


def test_csv_has_a_row_a_module_or_a_pair(several: list[Path], small: Path) -> None:
    alone = rows_of(loralens.similarity(small))
    assert len(alone) == 6 * 5 / 2
    assert alone[0].keys() == {"first", "second", "width", "phi_first", "phi", "chance", "z"}
    assert alone[-1]["phi"] == ""  # of a module that is 0
    (row, *_) = rows_of(loralens.similarity(*several[:2]))
    similarity = loralens.similarity(*several[:2])[QUERY]
    assert (row["name"], row["out"], row["in"], row["ranks"]) == (QUERY, "12", "10", "2 2")
    assert float(row["cosine"]) == similarity.cosine
    assert float(row["phi_all"]) == similarity.overlap.full
    assert float(row["cka_in"]) == similarity.cka["in"]
    pairs = rows_of(loralens.similarity(several))
    assert [(row["first"], row["second"]) for row in pairs[:3]] == [("a", "b"), ("a", "c"), ("a", "d")]
    assert float(pairs[0]["cosine"]) == pytest.approx(loralens.similarity(*several[:2]).cosine)
    assert {"phi_in", "phi_out", "chance_in", "shared_initialisation"} <= pairs[0].keys()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_tables_fit_every_terminal(several: list[Path], count: int) -> None:
    result = loralens.similarity(*several[:count])
    check_tables_fit(result)
    assert result.to_latex().count(r"\begin{tabular}") == len([table for table in result.tables() if table.rows])
    assert result._repr_html_().count("<table")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_each_has_its_figure(several: list[Path], count: int) -> None:
    assert loralens.plot(loralens.similarity(*several[:count])).axes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"of": "C"}, "update, A, B"),
        ({"of": None}, "update, A, B"),
        ({"side": "output"}, "in, out"),
        ({"of": "A", "side": "out"}, "A has no out side"),
        ({"phi_rank": 0}, "give 1 or more"),
        ({"modules": ["k_prj"]}, "the nearest names are"),
    ],
)
def test_wrong_values_name_the_right_ones(several: list[Path], options: dict[str, Any], message: str) -> None:
    with pytest.raises(loralens.OptionError, match=message):
        loralens.similarity(*several[:2], **options)


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(loralens.OptionError, match="no adapter is given"):
        loralens.similarity()


KEPT = Path("examples/adapters")
ONE_TASK = ("20newsgroups-r8-seed0", "20newsgroups-r8-seed1")
ONE_SEED = ("20newsgroups-r8-seed0", "reuters-r8-r8-seed0")


def test_the_side_is_out_unless_the_factor_or_the_user_says_otherwise(several):
    sides = {of: loralens.similarity(*several[:2], of=of).side for of in ("update", "A", "B")}
    assert sides == {"update": "out", "A": "in", "B": "out"}
    for count in (1, 2, 3):
        assert loralens.similarity(*several[:count]).record()["side"] == "out"
        assert loralens.similarity(*several[:count], side="in").record()["side"] == "in"


def test_the_out_side_orders_what_the_in_side_does_not():
    """The reason for the default, on adapters whose tasks and seeds are known (see its page)."""

    def shared(pair, side):
        result = loralens.similarity(*(KEPT / name for name in pair), side=side)
        return float(np.median([one.overlap.full for one in result.values()]))

    assert shared(ONE_TASK, "out") == pytest.approx(0.123, abs=5e-4)
    assert shared(ONE_SEED, "out") == pytest.approx(0.064, abs=5e-4)
    assert shared(ONE_TASK, "in") == pytest.approx(0.066, abs=5e-4)
    assert shared(ONE_SEED, "in") == pytest.approx(0.374, abs=5e-4)


def test_a_shared_start_is_a_warning_only_to_whoever_looks_at_the_in_side(capsys, caplog):
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
        (-1.0, 1.0, "fight"),
        (0.0, 1.0, "no more alike than two random updates"),
    ],
)
def test_the_conclusion_says_the_strongest_fact(factor, noise, words):
    rng = np.random.default_rng(3)
    first = {f"m{i}": loralens.LowRank(rng.standard_normal((60, 4)), rng.standard_normal((4, 50))) for i in range(3)}
    random = {name: rng.standard_normal((60, 50)) for name in first}
    dense = {name: module.B @ module.A for name, module in first.items()}
    scale = {name: np.linalg.norm(dense[name]) / np.linalg.norm(random[name]) for name in first}
    second = {
        name: loralens.LowRank(factor * dense[name] + noise * scale[name] * random[name], np.eye(50)) for name in first
    }
    result = loralens.similarity(loralens.Adapter(modules=first), loralens.Adapter(modules=second))
    assert words in " ".join(result.conclusion())
    one, two = (
        np.concatenate([np.asarray(x).ravel() for x in ms.values()])
        for ms in (dense, {n: m.B for n, m in second.items()})
    )
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two) if two.any() else 0.0
    assert f"cosine {cosine:+.3f}".replace("-", "−") in result.conclusion()[0]
    collection = loralens.similarity(*(loralens.Adapter(modules=part) for part in (first, second, first)))
    assert "practically the same adapter" in collection.conclusion()[0]


def test_the_overlap_of_unequal_ranks_is_said_of_the_fewer_directions() -> None:
    """φ divides by the lower rank, so it is no share of the directions of both."""
    rng = np.random.default_rng(0)

    def adapter(*ranks: int) -> loralens.Adapter:
        factors = [(rng.standard_normal((12, rank)), rng.standard_normal((rank, 10))) for rank in ranks]
        return loralens.Adapter(modules={f"b.{i}.q_proj": loralens.LowRank(*pair) for i, pair in enumerate(factors)})

    def said(first: loralens.Adapter, second: loralens.Adapter) -> str:
        return str(loralens.similarity(first, second).conclusion()[1])

    low, high, mixed = adapter(2, 2), adapter(5, 2), adapter(1, 3)
    assert "they share" in said(low, adapter(2, 2))
    assert "% of the directions of adapter 1 lie within those of adapter 2, where chance" in said(low, high)
    assert "% of the directions of adapter 2 lie within those of adapter 1, where chance" in said(high, low)
    assert "% of the directions of the lower rank lie within those of the higher one" in said(low, mixed)
