"""``loralens.intruders``: the result is what the command prints, and holds the adapter without them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from tests.bases import contents
from tests.cli.command import Command
from tests.draws import draw_adapter
from tests.verbs.shown import record_of

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
    adapter = draw_adapter(rng, {f"model.layers.0.self_attn.{kind}": (24, 24) for kind in ("q_proj", "v_proj")})
    loralens.save(adapter, folder / "lora")
    W = {f"{name}.weight": rng.standard_normal((24, 24)).astype(np.float32) for name in adapter}
    save_file(W, folder / "base.safetensors")
    return folder / "lora", folder / "base.safetensors"


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0}, "above 0, and at most 1"),
        ({"top": 0}, "give 1 or more"),
        ({"remove": float("inf")}, "give a finite number"),
        ({"output": "x"}, "give remove"),
        ({"cache": "c", "no_cache": True}, "exclude each other"),
        ({"cache_limit": "much"}, "'much' is not a size"),
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
