"""Moments on disk: the same back, the same bytes, and whatever is wrong with a file said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loralens import FormatError, Moments, OptionError, fingerprint, load_moments, save_moments
from loralens.core import Moment
from tests.conftest import small_adapter


def moments() -> Moments:
    rng = np.random.default_rng(0)
    adapter = small_adapter()
    X = {name: rng.standard_normal((5, 2)) for name in adapter}
    found = {name: Moment(x.T @ x / 5, 5, x.T @ x if "0.self" in name else None, 0.1 + i)
             for i, (name, x) in enumerate(X.items())}  # fmt: skip
    last = "model.layers.10.self_attn.v_proj"
    del found[last]
    found["model.layers.10.self_attn.q_proj"] = Moment(np.zeros((2, 2)), 0)
    return Moments(
        modules=found, fingerprint=fingerprint(adapter), unmeasured={last: "no é layer"}, source={"texts": 3}
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    made, path = moments(), tmp_path / "stats.safetensors"
    save_moments(made, path)
    back = load_moments(str(path))
    assert list(back) == list(made) == sorted(made, key=lambda name: int(name.split(".")[2]))
    assert len(back) == 5
    for name, moment in made.items():
        np.testing.assert_array_equal(back[name].K, moment.K)
        assert (back[name].count, back[name].trace) == (moment.count, moment.trace)
        assert (back[name].G is None) == (moment.G is None)
        if moment.G is not None:
            np.testing.assert_array_equal(back[name].G, moment.G)
    assert (back.fingerprint, dict(back.unmeasured), dict(back.source)) == (
        made.fingerprint, dict(made.unmeasured), dict(made.source),
    )  # fmt: skip
    assert back.unreached == ("model.layers.10.self_attn.q_proj",)
    assert "model.layers.0.self_attn.q_proj" in back
    with pytest.raises(OptionError, match="no é layer"):
        back["model.layers.10.self_attn.v_proj"]
    with pytest.raises(OptionError, match="no moments of nonsense"):
        back["nonsense"]


def test_the_same_bytes_every_time_and_overwriting_must_be_asked_for(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_moments(moments(), first)
    save_moments(moments(), second)
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(OptionError):
        save_moments(moments(), first)
    save_moments(replace(moments(), source={}), first, overwrite=True)
    assert first.read_bytes() != second.read_bytes()


def spoilt(tmp_path: Path, **changes: object) -> Path:
    """A file whose record or tensors are changed."""
    path = tmp_path / "stats.safetensors"
    save_moments(moments(), path)
    tensors = load_file(path)
    made = moments()
    record = {
        "version": 1, "fingerprint": made.fingerprint, "unmeasured": {}, "source": {},
        "counts": {name: m.count for name, m in made.items()}, "traces": {},
    }  # fmt: skip
    for key, value in changes.items():
        if key in record:
            record[key] = value
    tensors |= changes.get("tensors", {})  # type: ignore[operator]
    for name in changes.get("without", ()):  # type: ignore[attr-defined]
        del tensors[name]
    save_file(tensors, path, {"loralens.moments": str(changes.get("text", json.dumps(record)))})
    return path


K = "model.layers.0.self_attn.q_proj.K"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "{"}, "is damaged, or of version None"),
        ({"counts": {"a": -1}}, "no measurement gives"),
        ({"traces": {"a": -1.0}}, "no measurement gives"),
        ({"unmeasured": {"a": 1}}, "no measurement gives"),
        ({"counts": {}}, "belongs to no module"),
        ({"tensors": {K: np.full((2, 2), np.nan)}}, "NaN or Inf"),
        ({"tensors": {K: np.array([[1.0, 0.5], [0.4, 1.0]])}}, "not a matrix of second moments"),
        ({"tensors": {K: np.array([[1.0, 2.0], [2.0, 1.0]])}}, "not a matrix of second moments"),
        ({"tensors": {K: np.eye(2) * 1e300}}, "not a matrix of second moments"),
    ],
    ids=str,
)
def test_damage_is_said(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message) as error:
        load_moments(spoilt(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path))


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere.safetensors: no such file$|no such file\n") as refused:
        load_moments(tmp_path / "nowhere.safetensors")
    assert "measure the moments: loralens calibrate" in refused.value.fix
    (tmp_path / "moments.safetensors").touch()
    with pytest.raises(OptionError) as misspelt:
        load_moments(tmp_path / "moment.safetensors")
    assert misspelt.value.fix == f"the nearest name there is {tmp_path / 'moments.safetensors'}"
