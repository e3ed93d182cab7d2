"""Adapters as Python users guess them: by place, by glob, copied and pickled."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

import loralens
from loralens import Adapter, LowRank, OptionError


def adapter() -> Adapter:
    draw = np.random.default_rng(0)
    names = [f"model.layers.{i}.self_attn.{kind}" for i in (10, 2) for kind in ("q_proj", "v_proj")]
    return Adapter(modules={name: LowRank(draw.normal(size=(6, 2)), draw.normal(size=(2, 4))) for name in names})


def test_places_count_in_natural_order() -> None:
    a = adapter()
    assert a[0] is a["model.layers.2.self_attn.q_proj"]
    assert a[-1] is a["model.layers.10.self_attn.v_proj"]
    with pytest.raises(IndexError):
        a[4]


def test_a_glob_gives_an_adapter() -> None:
    a = adapter()
    queries = a["*.q_proj"]
    assert isinstance(queries, Adapter)
    assert list(queries) == ["model.layers.2.self_attn.q_proj", "model.layers.10.self_attn.q_proj"]
    assert queries[0] is a[0]


@pytest.mark.parametrize("key", ["model.layers.2.self_attn.q_prjo", "*.q_prjo"])
def test_what_is_not_there_is_a_key_error_that_names_the_nearest(key: str) -> None:
    with pytest.raises(KeyError, match="q_proj") as caught:
        adapter()[key]
    assert isinstance(caught.value, OptionError)
    assert "fix:" in str(caught.value)


def files() -> list[Path]:
    return sorted(path for path in (Path(__file__).parents[1] / "conformance").iterdir() if path.is_dir())


@pytest.mark.some(15)
@pytest.mark.parametrize("folder", files(), ids=lambda path: path.name)
def test_copies_and_pickles_are_the_same_adapter(folder: Path) -> None:
    try:
        a = loralens.load(folder)
    except loralens.LoraLensError:
        pytest.skip("no adapter that is read without options")
    for b in (copy.deepcopy(a), pickle.loads(pickle.dumps(a)), copy.copy(a)):
        assert list(b) == list(a)
        assert repr(b) == repr(a)
        assert (b.config, b.metadata, b.findings) == (a.config, a.metadata, a.findings)
        for name, module in a.items():
            np.testing.assert_array_equal(b[name].singular_values(), module.singular_values())
        for key, extra in a.extra.items():
            np.testing.assert_array_equal(b.extra[key].tensor.read(), extra.tensor.read())


def test_a_notebook_sees_a_table_and_no_markup_of_names() -> None:
    a = Adapter(modules={"<b>x</b>": LowRank(np.ones((2, 1)), np.ones((1, 2)))})
    assert "&lt;b&gt;" in a._repr_html_()
    assert "<b>" not in a._repr_html_()
    assert "\n" not in repr(a)
