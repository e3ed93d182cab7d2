"""``loralens.amplify``: paths and objects; the result is what the command prints."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens.analysis import amplification, measure_amplification
from loralens.errors import OptionError
from loralens.verbs.shared.base_reading import base_weights
from tests.cli.command import Command
from tests.cli.test_amplify import small_base
from tests.verbs.shown import check_tables_fit, record_of, rows_of

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


def test_it_is_a_mapping_of_what_is_measured_below(small: Path, base: Path) -> None:
    adapter = loralens.load(small)
    result = loralens.amplify(adapter, base=base)
    below = measure_amplification(adapter, base_weights(base, adapter.modules).modules)
    assert list(result) == list(below)
    assert result[QUERY].rows == below[QUERY].rows
    assert repr(result) == f"AmplifyResult('adapter' on '{base}', 6 modules)"


def test_one_module_is_said_of_in_the_singular(small: Path, base: Path) -> None:
    said = loralens.amplify(small, base=base, modules=["model.layers.0.self_attn.q_proj"]).conclusion()
    assert "(median of 1 module)" in said[0]
    assert "1 of 1 module is beyond 3 standard deviations; by chance there would be 0.015 modules." in said[1]


def test_csv_has_a_row_a_module_and_rank_without_infinities(small: Path, base: Path) -> None:
    rows = rows_of(loralens.amplify(small, base=base, rank=[1, 2]))
    assert [(row["name"], row["rank"]) for row in rows[:2]] == [(QUERY, "1"), (QUERY, "2")]
    assert float(rows[1]["amplification"]) == pytest.approx(20**0.5 / 80**0.5)
    assert rows[-1]["amplification"] == rows[-1]["z"] == ""  # of a module that is 0


def test_a_direction_that_w_does_not_know_is_infinitely_amplified(tmp_path: Path) -> None:
    B, A = np.zeros((6, 2), np.float32), np.zeros((2, 4), np.float32)
    B[5, 0], A[0, 0] = 1, 1  # W has no row there
    loralens.save(loralens.Adapter(modules={QUERY: loralens.LowRank(B, A)}), tmp_path / "beside")
    result = loralens.amplify(tmp_path / "beside", base=small_base(tmp_path / "base"))
    assert "∞" in result.tables()[0].columns[-3].cell(result.rows[0])
    assert record_of(result)["modules"][0]["amplification"] is None


@pytest.mark.slow
def test_tables_fit_every_terminal_and_there_is_a_figure(small: Path, base: Path) -> None:
    result = loralens.amplify(small, base=base)
    check_tables_fit(result)
    assert loralens.plot(result).axes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "between 1 and 2"),
        ({"directions": 0}, "give 1 or more"),
        ({"directions": 2, "no_top": True}, "give one of the two"),
        ({"phi_rank": 0}, "give 1 or more"),
        ({"seed": -1}, "give 0 or more"),
        ({"device": "tpu"}, "no device is called 'tpu'"),
        ({"alpha": 3.0}, "the file states its own scale"),
    ],
)
def test_wrong_values_are_refused(small: Path, base: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(loralens.LoraLensError, match=message):
        loralens.amplify(small, base=base, **options)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter of one module, and a base whose weight is large enough for its directions to be kept."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("large")
    B, A = rng.standard_normal((530, 2)).astype(np.float32), rng.standard_normal((2, 520)).astype(np.float32)
    loralens.save(loralens.Adapter(modules={QUERY: loralens.LowRank(B, A)}), folder / "lora")
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
    weights = {"W": tmp_path / "turned.safetensors"}
    rng = np.random.default_rng(1)
    save_file({f"{QUERY}.weight": rng.standard_normal((530, 520)).astype(np.float16)}, weights["W"])
    calls: list[dict[str, Any]] = [{}, {"seed": 1}, {"directions": 3}, {"exact": True}, {"base": weights["W"]}]
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


def test_small_weights_and_no_top_keep_nothing(
    small: Path, base: Path, large: tuple[Path, Path], tmp_path: Path
) -> None:
    loralens.amplify(small, base=base, cache=tmp_path / "cache")
    loralens.amplify(large[0], base=large[1], no_top=True)
    assert not (tmp_path / "cache").exists()
    refused: list[dict[str, Any]] = [{"no_top": True, "cache": tmp_path}, {"no_cache": True, "cache": tmp_path}]
    for options in refused:
        with pytest.raises(OptionError):
            loralens.amplify(small, base=base, **options)


def test_a_folder_that_cannot_be_made_is_a_warning(large: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = ("--base", large[1], "--json")
    done = run.good(large[0], *words, "--cache", tmp_path / "file" / "inner")
    assert "warning: the directions of W are not kept" in done.stderr
    assert done.stdout == run.good(large[0], *words, "--no-cache").stdout
