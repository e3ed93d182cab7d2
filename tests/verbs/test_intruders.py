"""``loralens.intruders``: the result is what the command prints, and holds the adapter without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.bases import contents
from tests.cli.command import Command
from tests.verbs.shown import check_tables_fit, record_of, rows_of

run = Command("intruders")
QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test leaves anything in the user's own cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user-cache"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter as large as its random base, and the base."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("intruders")
    modules = {
        f"model.layers.0.self_attn.{kind}": loralens.LowRank(
            rng.standard_normal((24, 2)).astype(np.float32), rng.standard_normal((2, 24)).astype(np.float32)
        )
        for kind in ("q_proj", "v_proj")
    }
    loralens.save(loralens.Adapter(modules=modules), folder / "lora")
    W = {f"{name}.weight": rng.standard_normal((24, 24)).astype(np.float32) for name in modules}
    save_file(W, folder / "base.safetensors")
    return folder / "lora", folder / "base.safetensors"


def test_the_result_is_what_the_command_prints(pair: tuple[Path, Path]) -> None:
    path, base = pair
    for options, words in (({}, ()), ({"top": 3, "threshold": 0.7}, ("--top", 3, "--threshold", 0.7))):
        result = loralens.intruders(path, base=base, **options)
        assert record_of(result) == run.told(path, "--base", base, *words)
        assert run.good(path, "--base", base, *words, "--csv").stdout == result.to_csv()
        of_object = loralens.intruders(loralens.load(path), base=str(base), **options)
        assert {**record_of(of_object), "adapter": str(path)} == record_of(result)
        assert result.adapter is None


def test_it_is_a_mapping_and_csv_has_a_row_a_module(pair: tuple[Path, Path]) -> None:
    path, base = pair
    result = loralens.intruders(path, base=base, no_cache=True)
    assert result[QUERY].count == result.record()["modules"][0]["count"]
    assert repr(result) == f"IntrudersResult(2 modules, {result.total.count} of 20 directions are intruders)"
    rows = rows_of(result)
    assert [row["name"] for row in rows] == list(result)
    assert float(rows[0]["first_score"]) == result[QUERY].scores[result[QUERY].indices[0]]
    check_tables_fit(result)


def test_without_an_output_the_result_holds_the_adapter(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = pair
    before = contents(tmp_path), contents(path.parent)
    result = loralens.intruders(path, base=base, remove=0.3, no_cache=True)
    assert (contents(tmp_path), contents(path.parent)) == before
    assert isinstance(result.adapter, loralens.Adapter)
    assert result.adapter[QUERY].rank == 2 + result[QUERY].count > 2
    assert not any("write" in sentence or "wrote" in sentence for sentence in result.sentences())
    assert result.record()["output"]["path"] is None
    written = loralens.intruders(path, base=base, remove=0.3, output=tmp_path / "new", no_cache=True)
    for name, module in loralens.load(tmp_path / "new").items():
        np.testing.assert_array_equal(module.B, result.adapter[name].B)
        np.testing.assert_array_equal(module.A, result.adapter[name].A)
    words = ("--base", base, "--remove", 0.3, "-o", tmp_path / "shell", "--no-cache")
    told = run.told(path, *words)
    told["output"]["path"] = str(tmp_path / "new")
    assert record_of(written) == told
    assert contents(tmp_path / "new") == contents(tmp_path / "shell")


def test_a_dry_run_writes_nothing_and_holds_the_adapter_too(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path, base = pair
    result = loralens.intruders(path, base=base, remove=0, output=tmp_path / "new", dry_run=True, no_cache=True)
    assert not (tmp_path / "new").exists()
    assert result.adapter is not None
    assert result.sentences()[-1].startswith(f"would write {tmp_path / 'new'}: peft, ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "above 0, and at most 1"),
        ({"threshold": float("nan")}, "above 0, and at most 1"),
        ({"top": 0}, "give 1 or more"),
        ({"remove": float("inf")}, "give a finite number"),
        ({"output": "x"}, "give remove"),
        ({"dtype": "int8"}, "f32, bf16, f16"),
        ({"cache": "c", "no_cache": True}, "exclude each other"),
        ({"cache_limit": "much"}, "'much' is not a size"),
        ({"device": "abacus"}, "no device is called 'abacus'"),
    ],
)
def test_wrong_values_are_refused_before_the_work(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(
        "loralens.verbs.spectra.intruders.read_adapter", lambda *_, **__: pytest.fail("the work has begun")
    )
    with pytest.raises(loralens.OptionError, match=message):
        loralens.intruders(pair[0], base=pair[1], **options)
