"""``block=`` and ``--block`` of every verb that has ``modules``: the same as a glob for these blocks."""

import json
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import loralens
from loralens import OptionError
from loralens.verbs import VERBS
from tests.cli.command import Command


@pytest.fixture(scope="module")
def places(small: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The small adapter, another one, a base, and the base with the small adapter merged in."""
    home = tmp_path_factory.mktemp("blocks")
    rng = np.random.default_rng(0)
    weights = {f"{name}.weight": rng.standard_normal((6, 4)).astype("f4") for name in loralens.load(small)}
    (home / "base").mkdir()
    save_file(weights, home / "base" / "model.safetensors")
    (home / "base" / "config.json").write_text("{}")
    other = loralens.load(small)
    noise = {
        name: loralens.LowRank(rng.standard_normal((6, 2)).astype("f4"), module.A, 2.0)
        for name, module in other.items()
    }
    loralens.save(loralens.Adapter(modules=noise), home / "other")
    loralens.merge(home / "other", base=home / "base", output=home / "merged")
    return {"small": small, **{name: home / name for name in ("other", "base", "merged")}}


# Arguments as the command has them; names of `places` stand for paths.
WORDS: dict[str, tuple[str, ...]] = {
    "spectrum": ("other",),
    "similarity": ("small", "other"),
    "compress": ("other", "--rank", "1", "--dry-run"),
    "merge": ("other", "--base", "base", "--dry-run"),
    "unmerge": ("merged", "--adapter", "other", "--dry-run"),
}


def test_every_verb_that_chooses_modules_chooses_blocks() -> None:
    options = {verb: signature(getattr(loralens, verb)).parameters for verb in VERBS}
    assert [verb for verb, names in options.items() if "modules" in names and "block" not in names] == []


def told(verb: str, places: dict[str, Path], *more: str) -> Any:
    done = Command(verb).run(*(places.get(word, word) for word in WORDS[verb]), *more, "--json")
    assert done.exit_code in (0, 1), done.output
    record = json.loads(done.stdout)
    # What repeats the words that were given, and the size of a file that has them in its header.
    if "recipe" in record:
        record["adapters"] = [{**adapter, "modules": None} for adapter in record["adapters"]]
        del record["recipe"], record["total"]
    return {key: value for key, value in record.items() if key not in ("chosen", "command")}


@pytest.mark.some(3)
@pytest.mark.parametrize("verb", WORDS)
def test_a_block_is_the_glob_of_its_modules(verb: str, places: dict[str, Path]) -> None:
    by_glob = told(verb, places, "-m", "*.1.*", "-m", "*.10.*")
    assert told(verb, places, "--block", "1-10") == by_glob
    assert told(verb, places, "--block", "1", "--block", "10") == by_glob
    assert told(verb, places, "--block", "1,10") == by_glob
    one = told(verb, places, "-m", "model.layers.1.self_attn.q_proj")
    assert told(verb, places, "-m", "q_proj", "--block", "1") == one
    assert one != by_glob


def test_a_block_without_modules_is_refused(places: dict[str, Path]) -> None:
    said = Command("spectrum").refused(places["other"], "--block", "7")
    assert "no module is in block 7\n  fix: the modules are in the blocks 0-1, 10 of model.layers" in said


CALLS: dict[str, Callable[[Any], Any]] = {
    "one number": lambda path: loralens.spectrum(path, block=1),
    "a text": lambda path: loralens.spectrum(path, block="1"),
    "several": lambda path: loralens.spectrum(path, block=[1]),
    "a range of Python": lambda path: loralens.spectrum(path, block=range(1, 2)),
    "with modules": lambda path: loralens.spectrum(path, modules="*", block="1-9"),
}


@pytest.mark.parametrize("call", CALLS)
def test_how_python_gives_blocks(call: str, places: dict[str, Path]) -> None:
    expected = loralens.spectrum(places["other"], modules=["*.1.*"]).record()
    assert CALLS[call](places["other"]).record() == expected


def test_blocks_in_weights_of_modules(places: dict[str, Path]) -> None:
    other = loralens.load(places["other"])
    result = loralens.combine((other, {"q_proj@1": 0.5, "model.layers.10": 0.25})).adapter
    factors = {name: result[name].scale / other[name].scale for name in other}
    assert factors == {
        name: 0.5 if name == "model.layers.1.self_attn.q_proj" else 0.25 if ".10." in name else 1.0 for name in other
    }
    with pytest.raises(OptionError, match="is not a block"):
        loralens.drop(other, block="last")


@pytest.mark.parametrize(
    ("name", "block", "part", "count"),
    [
        ("qwen05b-peft-r8", "0-2", ".layers.", 6),  # q and v of three blocks
        ("minilm-souravt-ckpt750", "5", ".layer.5.", 2),
        ("sam-vitb-rank4", "3", "w_003", 1),  # numbers for names count modules
        ("sd15-timohavdk-kohya", "IN04", "down_blocks_1_attentions_0", 8),
        ("sd15-timohavdk-diffusers", "MID", "mid_block", 8),
        ("flux-aitoolkit-r16", "S07,S12", "single_transformer_blocks.", 2),
    ],
)
def test_blocks_of_adapters_that_people_published(real: Path, name: str, block: str, part: str, count: int) -> None:
    chosen = loralens.inspect(real / name, block=block).adapters[0].modules
    assert len(chosen) == count
    assert all(part in module for module in chosen)
