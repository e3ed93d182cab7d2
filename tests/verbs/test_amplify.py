"""``loralens.amplify``: paths and objects; the result is what the command prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.analysis import amplification
from tests.cli.command import Command
from tests.conftest import small_adapter, small_base
from tests.draws import draw_adapter
from tests.verbs.shown import record_of

run = Command("amplify")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ()),
        (
            {"rank": [2, 1], "no_top": True, "modules": ["q_proj"]},
            ("--rank", 2, "--rank", 1, "--no-top", "-m", "q_proj"),
        ),
        ({"rank": 1, "exact": True, "directions": 3}, ("--rank", 1, "--exact", "--directions", 3)),
    ],
)
def test_the_result_is_what_the_command_prints(
    small: Path, base: Path, options: dict[str, Any], words: tuple[object, ...]
) -> None:
    result = loralens.amplify(small, base=base, **options)
    assert record_of(result) == run.told(small, "--base", base, *words)
    assert run.good(small, "--base", base, *words, "--csv").stdout == result.to_csv()
    of_object = loralens.amplify(loralens.load(small), base=str(base), **options)
    assert {**record_of(of_object), "adapter": str(small)} == record_of(result)


def test_a_direction_that_w_does_not_know_is_infinitely_amplified(tmp_path: Path) -> None:
    B, A = np.zeros((6, 2), np.float32), np.zeros((2, 4), np.float32)
    B[5, 0], A[0, 0] = 1, 1  # W has no row there
    loralens.save(loralens.Adapter(modules={QUERY: loralens.LowRank(B, A)}), tmp_path / "beside")
    result = loralens.amplify(tmp_path / "beside", base=small_base(tmp_path / "base"))
    assert "∞" in result.tables()[0].columns[-3].cell(result.rows[0])
    assert record_of(result)["modules"][0]["amplification"] is None


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of one module, and a base whose weight is large enough for its directions to be kept."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("large")
    loralens.save(draw_adapter(rng, {QUERY: (530, 520)}), folder / "lora")
    save_file({f"{QUERY}.weight": rng.standard_normal((530, 520)).astype(np.float16)}, folder / "base.safetensors")
    return folder / "lora", folder / "base.safetensors"


def refuse(*_: object, **__: object) -> None:
    pytest.fail("the directions of W are computed again")


@pytest.mark.some(1)
@pytest.mark.parametrize("options", [{}, {"exact": True}, {"directions": 5, "seed": 3}])
def test_directions_of_w_are_computed_once(
    large: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    path, base = large
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fresh = loralens.amplify(path, base=base, no_cache=True, **options)
    assert not list(tmp_path.iterdir())
    first = loralens.amplify(path, base=base, **options)
    (entry,) = (tmp_path / "loralens").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(amplification, "leading_svd", refuse)
        again = loralens.amplify(path, base=base, **options)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        entry.rename(elsewhere / entry.name)
        there = loralens.amplify(path, base=base, cache=elsewhere, **options)
    assert record_of(fresh) == record_of(first) == record_of(again) == record_of(there)


def test_directions_are_those_of_the_weight_and_of_the_options(large: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = large
    other = tmp_path / "turned.safetensors"
    save_file({f"{QUERY}.weight": np.random.default_rng(1).standard_normal((530, 520)).astype(np.float16)}, other)
    calls: list[dict[str, Any]] = [{}, {"seed": 1}, {"directions": 3}, {"exact": True}, {"base": other}]
    for number, options in enumerate(calls, start=1):
        told = loralens.amplify(path, **{"base": base, "cache": tmp_path / "cache", **options})
        assert record_of(told) == record_of(loralens.amplify(path, **{"base": base, "no_cache": True, **options}))
        assert len(list((tmp_path / "cache").iterdir())) == number
    # Fewer directions of ΔW are compared with as many of W; the strength of ΔW plays no role.
    loralens.amplify(path, base=base, cache=tmp_path / "cache", rank=1)
    module = loralens.load(path)[QUERY]
    louder = loralens.Adapter(modules={QUERY: loralens.LowRank(3 * module.B, module.A)})
    loralens.amplify(louder, base=base, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == len(calls) + 1


def test_a_damaged_entry_is_computed_again(large: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = large
    first = loralens.amplify(path, base=base, cache=tmp_path)
    (entry,) = tmp_path.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert record_of(loralens.amplify(path, base=base, cache=tmp_path)) == record_of(first)
    assert entry.read_bytes() == whole


def test_the_record_keeps_its_contract(small: Path, base: Path) -> None:
    record = run.told(small, "--base", base)
    assert (record["adapter"], record["base"], record["device"]) == (str(small), str(base), "cpu")
    assert [module["name"] for module in record["modules"]] == list(small_adapter())
    query = record["modules"][0]
    assert query["amplification"] == pytest.approx(20**0.5 / 80**0.5)
    assert query["weight_norm"] == pytest.approx(85**0.5)
    assert query["relative_norm"] == pytest.approx(20**0.5 / 85**0.5)
    assert query["curve"][-1] == {key: query[key] for key in query["curve"][-1]}
    assert query["top"]["sigma"] == pytest.approx([8, 4])
    np.testing.assert_allclose(query["phi"]["out"], [[1, 1], [1, 1]])
    np.testing.assert_allclose(query["phi"]["chance_out"], [[1 / 6, 2 / 6], [2 / 6, 2 / 6]])
    zero = record["modules"][-1]
    assert (zero["rank"], zero["delta_norm"], zero["amplification"], zero["z"], zero["curve"]) == (0, 0, None, None, [])
