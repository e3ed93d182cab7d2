"""``loralens similarity`` of one and two adapters: exact output on a small pair, the JSON contract, the error exits."""

import re
from pathlib import Path

import numpy as np
import pytest

import loralens
from tests.cli.command import Command
from tests.conftest import small_adapter

QUERY = "model.layers.0.self_attn.q_proj"

CALL = Command("similarity")
run, told, good = CALL.run, CALL.told, CALL.good


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_adapter` with an A of its own: queries keep direction 1 and turn direction 2, values trade theirs."""

    def turned(name: str, module: loralens.LowRank) -> loralens.LowRank:
        A = np.zeros((2, 4), np.float32)
        A[0, int("v_proj" in name)] = A[1, 2 - 2 * int("v_proj" in name)] = 1
        return loralens.LowRank(module.B, A, module.scale, scaling=module.scaling)

    modules = {name: turned(name, module) for name, module in small_adapter().items() if ".1." not in name}
    folder = tmp_path_factory.mktemp("adapters") / "other"
    loralens.save(loralens.Adapter(modules=modules, base_model="tiny/base"), folder)
    return folder


TABLE = """\
small and other agree in part: cosine +0.547 over 4 modules, 4.6 standard deviations from chance.
On the out side of ΔW they share 100 % of their directions, where chance gives 33 % (mean of φ of all directions).

SMALL and OTHER: 4 modules, out side of ΔW
module                            r  cosine     z  φ(1,1)  φ(all)  chance     z  θ min °  median  max °  distance    CKA
model.layers.0.self_attn.q_proj   2  +0.800  +3.9   1.000   1.000    0.33  +4.5      0.0     0.0    0.0     0.000  1.000
model.layers.0.self_attn.v_proj   2  +0.000  +0.0   1.000   1.000    0.33  +4.5      0.0     0.0    0.0     0.000  0.983
model.layers.10.self_attn.q_proj  2  +0.800  +3.9   1.000   1.000    0.33  +4.5      0.0     0.0    0.0     0.000  1.000
1 module within 4 standard deviations of chance, -v shows all

mean by kind
kind    side  modules  cosine  φ(1,1)  chance  > 0.5  φ(all)  chance     z    CKA
q_proj  in          2  +0.800  1.0000    0.25      2  0.5000     0.5  +0.0  0.941
q_proj  out         2  +0.800  1.0000    0.17      2  1.0000    0.33  +4.5  1.000
v_proj  in          1  +0.000  0.0000    0.25      0  1.0000     0.5  +3.0  0.303
v_proj  out         1  +0.000  1.0000    0.17      1  1.0000    0.33  +4.5  0.983

not compared, as ΔW is 0: model.layers.10.self_attn.v_proj (both are 0)
only in SMALL: model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj
"""


def test_table_is_exactly_this(small: Path, other: Path) -> None:
    result = run(small, other)
    text = result.stdout.replace(str(small), "SMALL").replace(str(other), "OTHER")
    # The conclusion leaves out the folders that both paths share, and the others are numbered.
    assert re.sub(r"adapters\d+/", "", text) == TABLE
    assert result.stderr == ""


def test_the_table_has_the_smallest_and_the_largest_angle_in_degrees(small: Path, other: Path) -> None:
    lines = run(small, other, "--side", "in", "--verbose").stdout.splitlines()
    row = next(line.split() for line in lines if line.startswith(f"{QUERY} "))
    # The two planes of this module share one direction, and the other two are at right angles.
    assert row[8:11] == ["0.0", "45.0", "90.0"]


def test_a_shared_start_is_a_warning_with_advice(small: Path) -> None:
    assert run(small, small).stderr == ""
    result = good(small, small, "--side", "in")
    assert result.stderr.startswith("warning: shared initialisation: the A of 6 of 6 modules are alike entry by entry")
    assert "\n  fix: directions of the in side show the seed, not the task: look at --side out" in result.stderr
    assert told(small, small)["initialisation"]["verdict"] == "shared"


ALONE = """\
Of SMALL, model.layers.0.self_attn.q_proj and model.layers.1.self_attn.q_proj share most on the out side of ΔW: 100 \
% of their directions, where chance gives 33 %.

SMALL: 6 modules of width 6, out side of ΔW
kind    and     pairs  φ(1,1) nearest  φ(all) same block  next block  farther  chance
q_proj  q_proj      3           1.000                  –      1.0000   1.0000    0.33
q_proj  v_proj      6           1.000             1.0000      1.0000   1.0000    0.33
v_proj  v_proj      1           1.000                  –      1.0000        –    0.33

share most, compared with chance
module                            and                               φ(1,1)  φ(all)  chance     z
model.layers.0.self_attn.q_proj   model.layers.1.self_attn.q_proj    1.000  1.0000    0.33  +4.5
model.layers.0.self_attn.q_proj   model.layers.10.self_attn.q_proj   1.000  1.0000    0.33  +4.5
model.layers.0.self_attn.q_proj   model.layers.0.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.0.self_attn.q_proj   model.layers.1.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.1.self_attn.q_proj   model.layers.10.self_attn.q_proj   1.000  1.0000    0.33  +4.5
model.layers.1.self_attn.q_proj   model.layers.0.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.1.self_attn.q_proj   model.layers.1.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.10.self_attn.q_proj  model.layers.0.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.10.self_attn.q_proj  model.layers.1.self_attn.v_proj    1.000  1.0000    0.33  +4.5
model.layers.0.self_attn.v_proj   model.layers.1.self_attn.v_proj    1.000  1.0000    0.33  +4.5

not compared, as ΔW is 0: model.layers.10.self_attn.v_proj
"""


def test_one_adapter_is_compared_with_itself(small: Path) -> None:
    assert run(small).stdout.replace(str(small), "SMALL") == ALONE
    record = told(small)
    (group,) = record["groups"]
    assert (group["width"], len(group["modules"]), group["directions"]) == (6, 6, [2, 2, 2, 2, 2, 0])
    assert np.shape(group["phi"]) == np.shape(group["first"]) == np.shape(group["z"]) == (6, 6)
    assert group["phi"][5] == [None] * 6
    assert (record["cosine"], record["shared_initialisation"]) == ([[1.0]], [[1.0]])
    assert "no other module is as wide as model.layers.0.self_attn.q_proj" in run(small, "-m", QUERY).stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SMALL", "OTHER", "--of", "A", "--side", "out"], "A has no out side"),
        (
            ["SMALL", "OTHER", "-m", "*.1.*"],
            "only one of the two adapters has model.layers.1.self_attn.q_proj and 1 more",
        ),
        (["SMALL", "-m", QUERY, "--plot", "TMP/x.png"], "no two modules have the same width"),
    ],
)
def test_what_is_wrong_is_one_message_and_exit_2(
    small: Path, other: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    known = {"SMALL": str(small), "OTHER": str(other)}
    result = run(*(known.get(a, a.replace("TMP", str(tmp_path))) for a in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "\n  fix: " in result.stderr


def spoiled(small: Path, folder: Path, factor: float) -> Path:
    """The small adapter with every B times ``factor``."""
    adapter = loralens.load(small)
    loralens.save(
        adapter.map(lambda m: loralens.LowRank(m.B * np.float32(factor), m.A, m.scale, scaling=m.scaling)), folder
    )
    return folder


def test_an_update_that_is_0_everywhere_has_no_numbers(small: Path, tmp_path: Path) -> None:
    zero = spoiled(small, tmp_path / "zero", 0)
    result = run(zero, small, "--side", "in")
    assert "cannot be compared: one of them is 0 in every module" in result.stdout.splitlines()[0]
    assert "nan" not in result.stdout + result.stderr
    assert "(mean cosine 1.00)\n  fix: one of them is 0 in every module" in result.stderr
    record = told(zero, small)
    assert (record["cosine"], record["cosine_z"]) == ([[1.0, None], [None, 1.0]], None)
    alone = run(zero).stdout
    assert "nan" not in alone
    assert "\n\nnot compared, as ΔW is 0: model.layers.0.self_attn.q_proj, model.layers.1." in alone
    assert alone.endswith(" and 3 more\n")


# ---- Three adapters and more

N = 40


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
    """b is near a, d conflicts with a in every v, c has an A of its own and lacks the last block."""
    folder = tmp_path_factory.mktemp("collection")
    away = adapter(0.5, 3, range(2)).map(lambda m: loralens.LowRank(m.B, 0.2 * m.A + np.roll(m.A, 5), m.scale))
    made = {"a": adapter(0.0, 1), "b": adapter(0.3, 2), "c": away, "d": adapter(0.2, 4, v=-0.5)}
    for name, one in made.items():
        loralens.save(one, folder / name)
    return [folder / name for name in made]


def test_an_adapter_that_cannot_be_compared_is_named(collection: list[Path], tmp_path: Path) -> None:
    stranger = loralens.Adapter(modules={"head": loralens.LowRank(np.ones((3, 1)), np.ones((1, 5)))})
    loralens.save(stranger, tmp_path / "stranger")
    text = run(*collection[:2], tmp_path / "stranger").stdout
    (line,) = [line for line in text.splitlines() if line.startswith("not compared: ")]
    assert line.endswith("stranger has no module of the others' names and shapes")
    row = next(line for line in text.splitlines() if "stranger  " in line)
    assert row.split()[2:5] == ["0", "–", "–"]
