"""Updates that leave float64: one message from every verb, never a traceback or a warning of NumPy; JSON stays JSON."""

import json
import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.bases import sharded, tensors
from tests.cli.command import Command

VERBS = [
    "inspect IT",
    "doctor IT",
    "doctor IT --base BASE",
    "survey FOLDER --content",
    "spectrum IT",
    "similarity IT PLAIN",
    "similarity IT",
    "trajectory IT PLAIN",
    "equal IT PLAIN",
    "curve IT",
    "compress IT --rank 1 -o OUT",
    "compress IT --energy 0.9 --to kohya -o OUT.safetensors",
    "convert IT --to kohya -o OUT.safetensors",
    "combine IT PLAIN -o OUT",
    "combine IT PLAIN --method ties -o OUT",
    "scale IT --by 1e10 -o OUT",
    "negate IT -o OUT",
    "subtract PLAIN IT -o OUT",
    "drop IT -m q_proj -o OUT",
    "merge IT --base BASE -o OUT",
    "amplify IT --base BASE",
    "intruders IT --base BASE",
]


@pytest.fixture
def places(small, tmp_path):
    folder = tmp_path / "folder"
    base = sharded(tmp_path / "base", tensors(size=2.0))
    return {"IT": shutil.copytree(small, folder / "it"), "PLAIN": small, "BASE": base, "FOLDER": folder}


def huge(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e308}))


def infinite(folder):
    """The scale alone is within float64, and ΔW is not: products overflow where they are formed first."""
    huge(folder)
    file = folder / "adapter_model.safetensors"
    save_file({key: tensor * 1e6 for key, tensor in load_file(file).items()}, file)


def broken(folder):
    file = folder / "adapter_model.safetensors"
    stored = load_file(file)
    key = min(stored)
    stored[key] = np.full_like(stored[key], np.nan)
    save_file(stored, file)


def refuse(word):
    raise ValueError(f"{word} is no JSON")


@pytest.mark.some(23)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("damage", [huge, infinite, broken])
def test_every_verb_ends_with_json_or_one_message(damage, verb, places, tmp_path):
    damage(places["IT"])
    words = [verb.split()[0]]
    for word in verb.split()[1:]:
        out = word.replace("OUT", str(tmp_path / "out")) if word.startswith("OUT") else word
        words.append(str(places.get(word, out)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = Command().run(*words, "--json")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.output.count("error:") <= 1
    if done.stdout:
        json.loads(done.stdout, parse_constant=refuse)
    else:
        assert done.stderr.count("fix:") >= 1
        # What ends with an error has written nothing.
        assert not list(tmp_path.glob("out*"))


def test_a_merge_of_an_update_beyond_float32_writes_no_infinities(places, tmp_path):
    huge(places["IT"])
    assert "is beyond float32, in which an update is added to a weight" in Command().refused(
        "merge", places["IT"], "--base", places["BASE"], "-o", tmp_path / "out"
    )
    assert not (tmp_path / "out").exists()
