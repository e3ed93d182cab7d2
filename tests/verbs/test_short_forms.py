"""``negate``, ``scale``, ``subtract``, ``interpolate`` and ``drop`` from Python."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import loralens
from loralens import Adapter
from tests.conftest import small_adapter

VERBS: dict[str, tuple[Callable[..., Any], list[str], dict[str, Any]]] = {  # inputs, and options that are required
    "negate": (loralens.negate, ["small"], {}),
    "scale": (loralens.scale, ["small"], {"by": -0.5}),
    "subtract": (loralens.subtract, ["small", "other"], {}),
    "interpolate": (loralens.interpolate, ["small", "other"], {"at": 0.2}),
    "drop": (loralens.drop, ["small"], {"modules": ["v_proj"]}),
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an adapter, and 2.5 times it, in which the test works."""
    loralens.save(small_adapter(), tmp_path / "small")
    loralens.save(2.5 * small_adapter(), tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("verb", VERBS)
def test_objects_are_as_good_as_paths_and_nothing_is_written(files: Path, verb: str) -> None:
    function, inputs, required = VERBS[verb]
    before = sorted(files.rglob("*"))
    by_path, by_object = (function(*given, **required) for given in (inputs, map(loralens.load, inputs)))
    assert by_path.output is by_object.output is None
    assert loralens.fingerprint(by_path.adapter) == loralens.fingerprint(by_object.adapter)
    dry = function(*inputs, **required, output="out", dry_run=True)
    assert dry.output is dry.record()["target"] is None
    assert sorted(files.rglob("*")) == before
    for line in (repr(by_path), dry.conclusion()[0]):
        assert len(line) < 120
        assert "\n" not in line


def assert_multiple(result: Adapter, expected: Callable[[str], float]) -> None:
    for name, module in small_adapter().items():
        np.testing.assert_allclose(result[name].dense(), expected(name) * module.dense(), atol=1e-6)


def test_the_arithmetic(files: Path) -> None:
    def inside(factor: float) -> Callable[[str], float]:
        return lambda name: factor if ".0." in name else 1.0

    assert_multiple(loralens.negate("small").adapter, lambda name: -1)
    assert_multiple(loralens.negate("small", modules="*.0.*").adapter, inside(-1))
    assert_multiple(loralens.scale("small", 3).adapter, lambda name: 3)
    assert_multiple(loralens.scale("small", by=0.5, modules=["*.0.*"]).adapter, inside(0.5))
    assert_multiple(loralens.subtract("small", "other").adapter, lambda name: -1.5)
    assert_multiple(loralens.subtract("small", "other", modules="*.0.*").adapter, inside(-1.5))
    assert_multiple(loralens.interpolate("small", "other", 0.2).adapter, lambda name: 1.3)
    assert_multiple(loralens.interpolate("small", "other", at=-1, modules="*.0.*").adapter, inside(-0.5))
    alive = loralens.subtract("small", "small", modules="*.0.*", drop_dead=True).adapter
    assert len(alive) == 3  # one module is 0 in the file


def test_modules_are_dropped_and_named(files: Path) -> None:
    result = loralens.drop("small", "v_proj")
    assert result.dropped == [name for name in small_adapter() if name.endswith("v_proj")]
    assert list(result.adapter) == [name for name in small_adapter() if name.endswith("q_proj")]
    lines = result.to_csv().splitlines()
    assert lines[0] == "name,out,in,rank,scale,dropped"
    assert [line.rpartition(",")[2] for line in lines[1:]] == ["False", "True"] * 3
    assert "<table" in result._repr_html_()
    assert result.conclusion() == ["small without 3 of its 6 modules; 3 left (peft)."]  # nobody asked for a file
    dry = loralens.drop("small", "v_proj", dry_run=True)
    assert dry.conclusion() == ["Would write: small without 3 of its 6 modules; 3 left (peft)."]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not possible"),
        ({"to": "zip"}, "to 'zip' is not possible"),
        ({"modules": "k_proj"}, "no module matches 'k_proj'"),
        ({"output": "small"}, "is where the source is"),
        ({"output": "other"}, "exists|is where the source is"),
    ],
)
def test_wrong_values_are_refused(files: Path, verb: str, options: dict[str, Any], message: str) -> None:
    function, inputs, required = VERBS[verb]
    with pytest.raises(loralens.OptionError, match=message) as error:
        function(*inputs, **{**required, **options})
    assert error.value.fix


def test_a_multiple_keeps_the_stored_bits(files: Path) -> None:
    whole, negated = loralens.load("small"), loralens.negate("small").adapter
    assert all(np.array_equal(negated[name].B, whole[name].B) for name in whole)
    assert loralens.equal("small", loralens.negate(negated).adapter, tolerance=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "much", None])
def test_a_strength_has_to_be_a_finite_number(files: Path, value: Any) -> None:
    for function, *inputs in ((loralens.scale, "small"), (loralens.interpolate, "small", "other")):
        with pytest.raises(loralens.OptionError, match="finite number"):
            function(*inputs, value)
