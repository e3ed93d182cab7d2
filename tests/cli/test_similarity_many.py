"""``loralens similarity`` of three and more: exact output on a small collection, the JSON contract."""

import json
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens.verbs.shared.adapters import short_labels
from tests.cli.command import Command

N = 40

run = Command("similarity").run


def adapter(angle: float, axis: int, blocks: range = range(3), v: float = 1.0) -> loralens.Adapter:
    """Rank one everywhere: out direction turned by ``angle`` towards ``axis``, in direction the first axis."""
    modules = {}
    for i in blocks:
        for kind, sign in (("q", 1.0), ("v", v)):
            B, A = np.zeros((N, 1), np.float32), np.zeros((1, N), np.float32)
            B[0], B[axis], A[0, 0] = sign * np.cos(angle), sign * np.sin(angle), 1
            modules[f"layers.{i}.{kind}"] = loralens.LowRank(B, A)
    return loralens.Adapter(modules=modules)


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """b is near a, d fights a in every v, c has an A of its own and lacks the last block."""
    folder = tmp_path_factory.mktemp("collection")
    away = adapter(0.5, 3, range(2)).map(lambda m: loralens.LowRank(m.B, 0.2 * m.A + np.roll(m.A, 5), m.scale))
    made = {"a": adapter(0.0, 1), "b": adapter(0.3, 2), "c": away, "d": adapter(0.2, 4, v=-0.5)}
    for name, one in made.items():
        loralens.save(one, folder / name)
    return [folder / name for name in made]


OUTPUT = """\
Of the 6 pairs the largest |cosine| is 0.955: a and b do much the same (cosine +0.955).
a and d fight most in blocks 0–2, v (cosine −0.980).

4 adapters, near ones side by side; energy inside and outside the others' directions
#  adapter  modules  r  ‖ΔW‖F   shared  by chance  private  by chance  start
1  c              4  1   2.04   2.96 %     0.19 %  22.10 %    90.19 %      2
2  b              6  1  2.449  91.27 %     0.29 %   0.00 %    89.46 %      1
3  a              6  1  2.449  97.37 %     0.29 %   0.00 %    89.46 %      1
4  d              6  1  1.936  96.05 %     0.29 %   0.00 %    89.46 %      1

cosine of the updates
#         1      2      3      4
1  c  1.000  0.164  0.172  0.053
2  b  0.164  1.000  0.955  0.296
3  a  0.172  0.955  1.000  0.310
4  d  0.053  0.296  0.310  1.000

φ, out side, mean over modules (chance 0.025)
#         1      2      3      4
1  c  1.000  0.703  0.770  0.740
2  b  0.703  1.000  0.913  0.877
3  a  0.770  0.913  1.000  0.961
4  d  0.740  0.877  0.961  1.000

shared initialisation: cosine of A
#         1      2      3      4
1  c  1.000  0.196  0.196  0.196
2  b  0.196  1.000  1.000  1.000
3  a  0.196  1.000  1.000  1.000
4  d  0.196  1.000  1.000  1.000

pairs, the largest |cosine| first
adapter  and  modules  cosine      z  φ out  by chance  cosine of A
a        b          6  +0.955  +93.6  0.913      0.025        1.000
a        d          6  +0.310  +30.4  0.961      0.025        1.000
b        d          6  +0.296  +29.0  0.877      0.025        1.000
a        c          4  +0.172  +13.8  0.770      0.025        0.196
b        c          4  +0.164  +13.2  0.703      0.025        0.196
c        d          4  +0.053   +4.3  0.740      0.025        0.196

two oppose each other (each module with |cosine| ≥ 0.2 and at least 4.0 standard deviations from chance)
adapter  and  in             modules  cosine  of all
a        d    blocks 0–2, v        3  −0.980  −0.310
b        d    blocks 0–2, v        3  −0.936  −0.296

two agree (each module with |cosine| ≥ 0.2 and at least 4.0 standard deviations from chance)
adapter  and  in                modules  cosine  of all
a        b    blocks 0–2, q, v        6  +0.955  +0.955
a        d    blocks 0–2, q           3  +0.980  +0.620
b        d    blocks 0–2, q           3  +0.936  +0.592

pairs have 4 to 6 modules in common: each is compared on those

began from one A (cosine of A ≥ 0.5): a, b, d
"""


def test_output_is_exactly_this(collection: list[Path]) -> None:
    assert run(*collection).stdout == OUTPUT


def test_json_keeps_its_contract(collection: list[Path]) -> None:
    record = json.loads(run("--json", "--phi", *collection).stdout)
    assert (record["loralens"], record["of"], record["side"]) == (loralens.__version__, "update", "out")
    assert record["adapters"] == [str(path) for path in collection]
    assert [(pair["first"], pair["second"]) for pair in record["pairs"]] == [
        (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3),
    ]  # fmt: skip
    first = record["pairs"][0]["modules"]
    assert [module["name"] for module in first] == [f"layers.{i}.{kind}" for i in range(3) for kind in "qv"]
    assert set(first[0]) >= {"phi", "chance", "cosine", "cosine_z", "principal_angles"}
    assert len(record["pairs"][1]["modules"]) == 4
    cosine = np.array(record["cosine"])
    assert cosine[0, 1] == pytest.approx(np.cos(0.3), abs=1e-6)
    assert cosine[0, 3] == pytest.approx(np.cos(0.2) * (1 - 0.5) / (2 * 1.25) ** 0.5, abs=1e-6)
    assert record["cosine_z"][0][1] == pytest.approx(np.cos(0.3) * N * 6**0.5, rel=1e-5)
    assert record["phi"]["out"][0][1] == pytest.approx(np.cos(0.3) ** 2, abs=1e-6)
    assert record["chance"]["in"][0][1] == pytest.approx(1 / N)
    assert record["common_modules"][0] == [6, 6, 4, 6]
    assert record["shared_initialisation"][0] == pytest.approx([1, 1, 0.2 / 1.04**0.5, 1])
    assert record["groups"] == [[0, 1, 3], [2]]
    assert sorted(record["order"]) == [0, 1, 2, 3]
    assert set(record["interference"][0]) == {
        "name", "shape", "cosine", "shared", "private", "shared_chance", "private_chance",
    }  # fmt: skip
    assert record["interference"][5]["shared"][2] is None
    fight = record["fights"][0]
    assert (fight["first"], fight["second"], fight["blocks"], fight["kinds"]) == (0, 3, [0, 2], ["v"])
    assert fight["cosine"] == pytest.approx(-np.cos(0.2), abs=1e-6)


def test_json_has_maps_of_pairs_only_if_they_are_asked_for(collection: list[Path]) -> None:
    with_maps, without = (json.loads(run("--json", *options, *collection).stdout) for options in (["--phi"], []))
    for pair in with_maps["pairs"]:
        for module in pair["modules"]:
            del module["phi"], module["chance"]
    assert without == with_maps


def test_side_rank_factor_and_modules_are_passed_on(collection: list[Path]) -> None:
    record = json.loads(run("--json", "--of", "B", "-m", "q", *collection).stdout)
    assert (record["of"], record["side"], list(record["phi"])) == ("B", "out", ["out"])
    assert {module["name"] for pair in record["pairs"] for module in pair["modules"]} == {
        "layers.0.q", "layers.1.q", "layers.2.q",
    }  # fmt: skip
    shown = run("--side", "out", *collection).stdout
    assert "φ, out side" in shown
    assert "φ, in side" not in shown


def test_what_nobody_shares_is_a_dash(collection: list[Path], tmp_path: Path) -> None:
    alone = loralens.Adapter(modules={"elsewhere.q": adapter(0.1, 1)["layers.0.q"]})
    loralens.save(alone, tmp_path / "alone")
    shown = run(*collection[:2], tmp_path / "alone").stdout
    assert "pairs have 0 to 6 modules in common: each is compared on those" in shown
    record = json.loads(run("--json", *collection[:2], tmp_path / "alone").stdout)
    assert record["cosine"][0][2] is None
    assert record["pairs"][1]["modules"] == []


@pytest.mark.slow
def test_many_adapters_leave_the_matrices_to_the_figure(collection: list[Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    paths = []
    for i in range(14):
        module = loralens.LowRank(rng.standard_normal((N, 2)), rng.standard_normal((2, N)))
        loralens.save(loralens.Adapter(modules={"layers.0.q": module}), tmp_path / f"task{i}")
        paths.append(tmp_path / f"task{i}")
    result = run(*paths, "--plot", tmp_path / "many.png")
    assert result.exit_code == 0
    assert "cosine of the updates" not in result.stdout
    assert "pairs, the largest |cosine| first" in result.stdout
    assert "79 more rows (--verbose shows every row)" in result.stdout
    assert "No two clearly oppose each other in any module (cosine −0.2 or less)." in result.stdout
    assert (tmp_path / "many.png").stat().st_size > 1000


def test_labels_leave_out_the_folders_that_all_share() -> None:
    assert short_labels(["/x/y/a", "/x/y/b", "/x/z/a"]) == ["y/a", "y/b", "z/a"]
    assert short_labels(["/x/a/m", "/x/b/m"]) == ["a/m", "b/m"]
    assert short_labels(["org/a", "org/a", "org/b"]) == ["a (1)", "a (2)", "b (3)"]
    assert short_labels(["a", "a/b", "c"]) == ["a", "a/b", "c"]


def test_no_module_in_common_is_exit_2(collection: list[Path], tmp_path: Path) -> None:
    for i in range(3):
        module = adapter(0.1, 1)["layers.0.q"]
        loralens.save(loralens.Adapter(modules={f"model{i}.q": module}), tmp_path / f"m{i}")
    result = run(*(tmp_path / f"m{i}" for i in range(3)))
    assert result.exit_code == 2
    assert "no two of these adapters have a module in common" in result.stderr


def test_an_adapter_that_cannot_be_compared_is_named(collection: list[Path], tmp_path: Path) -> None:
    stranger = loralens.Adapter(modules={"head": loralens.LowRank(np.ones((3, 1)), np.ones((1, 5)))})
    loralens.save(stranger, tmp_path / "stranger")
    text = run(*collection[:2], tmp_path / "stranger").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("not compared: ")]
    assert line.endswith("stranger has no module of the others' names and shapes")
    row = next(line for line in text.splitlines() if "stranger  " in line)
    assert row.split()[2:5] == ["0", "–", "–"]
